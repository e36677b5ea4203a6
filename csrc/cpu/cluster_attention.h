// What the operator hands to the kernels of a vector level.
#pragma once

#include "tree.h"
#include "view.h"

namespace vitkernels {

struct ClusterAttention {
  View q, k, v, out;      // forward: out
  View dout, dq, dk, dv;  // backward: the rest
  const int32_t* order;   // [B, heads, N], unit stride in N
  int64_t order_batch, order_head;
  Tree tree;
  int64_t heads, head_dim, overlap;
  double scale;

  // Sibling leaves, which share keys; or the single leaf.
  VITKERNELS_INLINE int64_t pairs() const { return tree.levels ? tree.leaves() / 2 : 1; }
  VITKERNELS_INLINE const int32_t* order_of(int64_t image, int64_t head) const {
    return order + image * order_batch + head * order_head;
  }
};

// Tasks [begin, end): the pairs of all heads of all images, in this order.
using ClusterAttentionKernel = void (*)(const ClusterAttention&, int64_t begin, int64_t end);

struct ClusterAttentionKernels {
  ClusterAttentionKernel forward[4], backward[4];  // by Element
};

namespace baseline {
ClusterAttentionKernels cluster_attention_kernels();
}
namespace avx2 {
ClusterAttentionKernels cluster_attention_kernels();
}
namespace avx512 {
ClusterAttentionKernels cluster_attention_kernels();
}

}  // namespace vitkernels
