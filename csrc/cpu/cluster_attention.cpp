// The operator cluster_attention on CPU tensors: outputs, the division of the work, the check of the order.
#include "cluster_attention.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "operator.h"

namespace vitkernels {
namespace {

// Pairs of leaves that are worth waking a thread for.
constexpr int64_t GRAIN = 4;

const ClusterAttentionKernels& kernels() {
  static ClusterAttentionKernels (*const make[])() = VITKERNELS_LEVELS(cluster_attention_kernels);
  static const ClusterAttentionKernels chosen = make[int(capability())]();
  return chosen;
}

ClusterAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& order, int64_t leaf_size,
                          int64_t overlap, double scale) {
  int64_t tokens = q.size(1), heads = q.size(2);
  STD_TORCH_CHECK(q.dim() == 4 && tokens >= 1 && leaf_size >= 1,
                  "expected [B, N, heads, head_dim] of N >= 1, leaf_size >= 1");
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int && order.dim() == 3 && order.size(0) == q.size(0) &&
                      order.size(1) == heads && order.size(2) == tokens && (order.stride(2) == 1 || tokens == 1),
                  "order must be int32 [B, heads, N] with unit stride in N");
  ClusterAttention problem{};
  problem.q = view_of(q), problem.k = view_of(k), problem.v = view_of(v);
  problem.order = static_cast<const int32_t*>(order.data_ptr());
  problem.order_batch = order.stride(0), problem.order_head = order.stride(1);
  problem.tree = Tree::of(tokens, leaf_size);
  problem.heads = heads, problem.head_dim = q.size(3), problem.overlap = overlap, problem.scale = scale;
  STD_TORCH_CHECK(overlap >= 0 && (problem.tree.levels == 0 || overlap <= tokens >> problem.tree.levels),
                  "overlap must be at least 0 and at most the smallest leaf");
  return problem;
}

// Whether every order holds every token once.
bool permutations(const ClusterAttention& problem, int64_t batch) {
  // a head of stride 0 is an order for all
  int64_t heads = problem.order_head ? problem.heads : 1, tokens = problem.tree.tokens;
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, batch * heads, 8, [&](int64_t begin, int64_t end) {
    std::vector<char> seen(tokens);
    for (int64_t i = begin; i < end; i++) {
      const int32_t* order = problem.order_of(i / heads, i % heads);
      std::fill(seen.begin(), seen.end(), 0);
      for (int64_t place = 0; place < tokens; place++) {
        int64_t token = order[place];
        if (token < 0 || token >= tokens || seen[token]++) return void(good = false);
      }
    }
  });
  return good;
}

void run(ClusterAttentionKernel kernel, const ClusterAttention& problem, int64_t batch) {
  torch::stable::parallel_for(0, batch * problem.heads * problem.pairs(), GRAIN,
                              [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor order, int64_t leaf_size, int64_t overlap,
                                   double scale, bool check) {
  Element element = element_of(q);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor statistic =
      torch::stable::new_empty(q, {0}, element == Element::DOUBLE ? ScalarType::Double : ScalarType::Float);
  ClusterAttention problem = describe(q, k, v, order, leaf_size, overlap, scale);
  problem.out = view_of(out);
  if (out.numel() == 0) return {out, statistic};
  STD_TORCH_CHECK(!check || permutations(problem, q.size(0)), "every order must be a permutation of its tokens");
  run(kernels().forward[int(element)], problem, q.size(0));
  return {out, statistic};
}

Tensor backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor order, Tensor statistic, int64_t leaf_size,
                int64_t overlap, double scale) {
  Tensor dqkv = torch::stable::new_empty(q, {q.size(0), q.size(1), 3, q.size(2), q.size(3)});
  ClusterAttention problem = describe(q, k, v, order, leaf_size, overlap, scale);
  problem.dout = view_of(dout);
  problem.dq = view_of_part(dqkv, 0), problem.dk = view_of_part(dqkv, 1), problem.dv = view_of_part(dqkv, 2);
  if (dqkv.numel() > 0) run(kernels().backward[int(element_of(q))], problem, q.size(0));
  return dqkv;
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("cluster_attention_forward", TORCH_BOX(&forward));
  m.impl("cluster_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
