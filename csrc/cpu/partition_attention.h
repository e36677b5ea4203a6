// What the operator hands to the kernels of a vector level.
#pragma once

#include "partition.h"
#include "view.h"

namespace vitkernels {

constexpr int64_t VECTOR_SLACK = 64;  // bytes

// The work in shares of a few heads, which lie side by side in memory, and some groups, (image, id) counted through the
// images. The same shares for any number of threads, so that the gradient of the bias has the same bits.
struct Division {
  static constexpr int64_t HEADS = 4, GROUPS = 4, SHARES = 64;  // at most, at least, about
  int64_t groups, heads;

  VITKERNELS_INLINE int64_t head_parts() const { return (heads + HEADS - 1) / HEADS; }
  VITKERNELS_INLINE int64_t group_parts() const {
    int64_t wanted = (SHARES + head_parts() - 1) / head_parts(), possible = (groups + GROUPS - 1) / GROUPS;
    return wanted < possible ? wanted : possible;
  }
  VITKERNELS_INLINE int64_t shares() const { return head_parts() * group_parts(); }
  VITKERNELS_INLINE int64_t first_head(int64_t part) const { return part * heads / head_parts(); }
  VITKERNELS_INLINE int64_t first_group(int64_t part) const { return part * groups / group_parts(); }
};

struct PartitionAttention {
  View q, k, v, out;      // forward: out
  View dout, dq, dk, dv;  // backward: the rest
  const void* bias;       // [heads, (2Gh-1)(2Gw-1)], key minus query, and VECTOR_SLACK bytes behind; or null
  int64_t bias_size;      // (2Gh-1)(2Gw-1)
  Map map;
  int64_t head_dim;
  double scale;
  Division work;
};

// Shares [begin, end) of the work. dbias: zeros, [group_parts, heads, (2Gh-1)(2Gw-1)], key minus query; null for no
// gradient.
using Forward = void (*)(const PartitionAttention&, int64_t begin, int64_t end);
using Backward = void (*)(const PartitionAttention&, int64_t begin, int64_t end, void* dbias);

struct PartitionAttentionKernels {
  Forward forward[4];  // by Element
  Backward backward[4];
};

namespace baseline {
PartitionAttentionKernels partition_attention_kernels();
}
namespace avx2 {
PartitionAttentionKernels partition_attention_kernels();
}
namespace avx512 {
PartitionAttentionKernels partition_attention_kernels();
}

}  // namespace vitkernels
