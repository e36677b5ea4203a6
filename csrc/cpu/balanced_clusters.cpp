// The operator balanced_clusters on CPU tensors.
#include "balanced_clusters.h"

#include "operator.h"

namespace vitkernels {
namespace {

const BalancedClustersKernels& kernels() {
  static BalancedClustersKernels (*const make[])() = VITKERNELS_LEVELS(balanced_clusters_kernels);
  static const BalancedClustersKernels chosen = make[int(capability())]();
  return chosen;
}

Tensor run(Tensor x, int64_t leaf_size, int64_t iterations, double temperature) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.size(1) <= INT32_MAX && leaf_size >= 1,
                  "expected [B, N, heads, D] of N >= 1, leaf_size >= 1");
  Tensor order = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1)}, ScalarType::Int);
  BalancedClusters problem{view_of(x),
                           static_cast<int32_t*>(order.data_ptr()),
                           Tree::of(x.size(1), leaf_size),
                           x.size(2),
                           x.size(3),
                           iterations,
                           float(temperature)};
  BalancedClustersKernel kernel = kernels().run[int(element_of(x))];
  STD_TORCH_CHECK(kernel, "balanced_clusters takes float32, float16 or bfloat16");
  torch::stable::parallel_for(0, x.size(0) * x.size(2), 1,
                              [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  return order;
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) { m.impl("balanced_clusters", TORCH_BOX(&run)); }

}  // namespace
}  // namespace vitkernels
