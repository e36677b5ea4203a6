// What the operator hands to the kernels of a vector level.
#pragma once

#include "tree.h"
#include "view.h"

namespace vitkernels {

struct BalancedClusters {
  View x;          // [B, N, heads, D]
  int32_t* order;  // [B, heads, N]
  Tree tree;
  int64_t heads, features, iterations;
  float temperature;
};

// Tasks [begin, end): the heads of all images, in this order.
using BalancedClustersKernel = void (*)(const BalancedClusters&, int64_t begin, int64_t end);

struct BalancedClustersKernels {
  BalancedClustersKernel run[4];  // by Element; none for DOUBLE
};

namespace baseline {
BalancedClustersKernels balanced_clusters_kernels();
}
namespace avx2 {
BalancedClustersKernels balanced_clusters_kernels();
}
namespace avx512 {
BalancedClustersKernels balanced_clusters_kernels();
}

}  // namespace vitkernels
