// What the operator hands to the kernels of a vector level.
#pragma once

#include <algorithm>

#include "inline.h"
#include "view.h"

namespace vitkernels {

// Along time, height and width, in tokens.
struct Lengths {
  int64_t t, h, w;

  VITKERNELS_INLINE int64_t of(int axis) const { return axis == 0 ? t : axis == 1 ? h : w; }
  VITKERNELS_INLINE int64_t lines() const { return t * h; }
};

// The rows of one axis' table, in an order in which those that a query meets follow each other, key by key.
struct Terms {
  const void* rows;        // [count, padded head_dim]; null where the axis has none
  const void* transposed;  // [head_dim, count] with rows of `stride`
  const int64_t* first;    // per coordinate of queries: the row of its first key
  int64_t count, stride;
  int64_t place;  // of its gradient, where it begins in a share's [terms_size, padded head_dim]
};

struct PooledAttention {
  View q, k, v, out;      // forward: out
  View dout, dq, dk, dv;  // backward: the rest
  Lengths queries, keys;
  Terms terms[3];
  int64_t terms_size;  // rows of all axes
  int64_t batch, heads, head_dim, cls, residual;
  double scale;

  VITKERNELS_INLINE int64_t query_tokens() const { return cls + queries.lines() * queries.w; }
  VITKERNELS_INLINE int64_t key_tokens() const { return cls + keys.lines() * keys.w; }

  // The queries in blocks of whole lines of their map: enough of them for the terms along the width, whose queries
  // stand in a column of the block.
  VITKERNELS_INLINE int64_t blocks() const {
    int64_t lines = std::max<int64_t>(6, 256 / queries.w);
    return (queries.lines() + lines - 1) / lines;
  }
  VITKERNELS_INLINE int64_t first_line(int64_t block) const { return block * queries.lines() / blocks(); }
  VITKERNELS_INLINE int64_t largest_block() const {
    return cls + (queries.lines() + blocks() - 1) / blocks() * queries.w;
  }

  // A backward pass cuts the blocks of a head into parts, each with a dk and dv of its own, and the parts of all heads
  // into shares, each with terms' gradients of its own. The same for any number of threads: and so are the bits.
  static constexpr int64_t SHARES = 8;
  VITKERNELS_INLINE int64_t parts() const { return std::min(blocks(), (SHARES + batch * heads - 1) / (batch * heads)); }
  VITKERNELS_INLINE int64_t first_block(int64_t part) const { return part * blocks() / parts(); }
  VITKERNELS_INLINE int64_t shares() const { return std::min(SHARES, batch * heads * parts()); }
};

// Elements of a row that is padded to cache lines, whatever the vectors.
template <class T>
VITKERNELS_INLINE int64_t padded_row(int64_t n) {
  constexpr int64_t LINE = 64 / sizeof(T);
  return (n + LINE - 1) / LINE * LINE;
}

// What the workers of a backward pass leave to be summed.
struct Partial {
  void* dkv;     // [parts, batch, heads, 2, keys, padded head_dim], of several parts
  void* dterms;  // [shares, terms_size, padded head_dim]; zeroed by the worker
};

struct PooledAttentionKernels {
  void (*forward[4])(const PooledAttention&, int64_t begin, int64_t end);                   // blocks of all heads
  void (*backward[4])(const PooledAttention&, const Partial&, int64_t begin, int64_t end);  // shares
  void (*combine[4])(const PooledAttention&, const Partial&, int64_t begin, int64_t end);   // images' heads: dk, dv
};

namespace baseline {
PooledAttentionKernels pooled_attention_kernels();
}
namespace avx2 {
PooledAttentionKernels pooled_attention_kernels();
}
namespace avx512 {
PooledAttentionKernels pooled_attention_kernels();
}

}  // namespace vitkernels
