// What the operator hands to the kernels of a vector level.
#pragma once

#include "inline.h"
#include "view.h"

namespace vitkernels {

// Windows along an axis of the map.
struct PoolAxis {
  int64_t tokens, kernel, stride, padding;

  VITKERNELS_INLINE int64_t windows() const { return (tokens + 2 * padding - kernel) / stride + 1; }
  // The first token of a window, before the map where it begins in the padding.
  VITKERNELS_INLINE int64_t first_token(int64_t window) const { return window * stride - padding; }
  // Windows that can have a token in common.
  VITKERNELS_INLINE int64_t overlap() const { return (kernel + stride - 1) / stride; }
};

struct PoolTokens {
  View x, out;       // forward: out
  View dout, dx;     // backward: the rest
  PoolAxis t, h, w;  // time, height, width
  int64_t heads, head_dim;
  bool maximum, cls, norm, learned;  // learned: the weights of the taps have a gradient
  double eps;
  const void* parameters;  // [taps + 2, row_size()]: of the taps, then weight and bias of the norm; the padding is zero
  void* dpooled;           // backward, see row_of_pooled(): the gradient of what the pooling alone gives
  int64_t images;          // that dpooled has room for

  VITKERNELS_INLINE int64_t taps() const { return t.kernel * h.kernel * w.kernel; }
  // Elements from one row of head_dim to the next in memory of the kernels' own: full vectors at every level.
  VITKERNELS_INLINE int64_t row_size() const { return (head_dim + 15) / 16 * 16; }
  // Rows of windows and, in the first place, the class token.
  VITKERNELS_INLINE int64_t rows() const { return cls + t.windows() * h.windows(); }
  VITKERNELS_INLINE int64_t rows_of_tokens() const { return t.tokens * h.tokens; }
  // Elements of dpooled for a window: its gradient and, of a maximum, the tap that won.
  VITKERNELS_INLINE int64_t pooled_size() const { return row_size() * (maximum ? 2 : 1); }
  // Rows of gradients for the parameters: of the taps, of the norm.
  VITKERNELS_INLINE int64_t gradients() const { return (learned ? taps() : 0) + (norm ? 2 : 0); }
};

// Rows of windows [begin, end), counted through the images.
using PoolForward = void (*)(const PoolTokens&, int64_t begin, int64_t end);
// Shares [begin, end) of these rows, so many to an image: writes dpooled, and dx of class tokens; adds to gradients,
// [end - begin, gradients(), row_size()].
using PoolBackwardWindows = void (*)(const PoolTokens&, int64_t shares, int64_t begin, int64_t end, void* gradients);
// Rows of tokens [begin, end), counted through the images: writes dx.
using PoolBackwardTokens = void (*)(const PoolTokens&, int64_t begin, int64_t end);

struct PoolTokensKernels {
  PoolForward forward[4];  // by Element
  PoolBackwardWindows backward_windows[4];
  PoolBackwardTokens backward_tokens[4];
};

namespace baseline {
PoolTokensKernels pool_tokens_kernels();
}
namespace avx2 {
PoolTokensKernels pool_tokens_kernels();
}
namespace avx512 {
PoolTokensKernels pool_tokens_kernels();
}

}  // namespace vitkernels
