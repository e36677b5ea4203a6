// The operator pooled_attention on CPU tensors: outputs, the terms of relative positions, the division of the work.
#include "pooled_attention.h"

#include <memory>
#include <optional>
#include <vector>

#include "operator.h"

namespace vitkernels {
namespace {

using Axes = std::vector<int64_t>;
using Table = std::optional<Tensor>;

const PooledAttentionKernels& kernels() {
  static PooledAttentionKernels (*const make[])() = VITKERNELS_LEVELS(pooled_attention_kernels);
  static const PooledAttentionKernels chosen = make[int(capability())]();
  return chosen;
}

ScalarType wide_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The terms of an axis, [queries, keys, head_dim], with rows padded; transposed, [queries, head_dim, keys].
template <class T>
std::vector<T> padded_terms(const Tensor& term, bool transposed) {
  int64_t queries = term.size(0), keys = term.size(1), head_dim = term.size(2);
  int64_t rows = transposed ? head_dim : keys, stride = padded_row<T>(transposed ? keys : head_dim);
  const T* from = static_cast<const T*>(term.data_ptr());
  std::vector<T> to(queries * rows * stride);
  for (int64_t i = 0; i < queries; i++)
    for (int64_t j = 0; j < keys; j++, from += head_dim)
      for (int64_t d = 0; d < head_dim; d++)
        to[(i * rows + (transposed ? d : j)) * stride + (transposed ? j : d)] = from[d];
  return to;
}

// The problem, and the memory of its terms.
template <class T>
class Call {
 public:
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Table (&terms)[3], const Axes& q_thw, const Axes& k_thw,
       bool has_cls, int64_t residual, double scale, bool backward) {
    STD_TORCH_CHECK(q_thw.size() == 3 && k_thw.size() == 3, "q_thw and k_thw must be (T, H, W)");
    problem.q = view_of(q), problem.k = view_of(k), problem.v = view_of(v);
    problem.queries = {q_thw[0], q_thw[1], q_thw[2]}, problem.keys = {k_thw[0], k_thw[1], k_thw[2]};
    problem.batch = q.size(0), problem.heads = q.size(2), problem.head_dim = q.size(3);
    problem.cls = has_cls, problem.residual = residual, problem.scale = scale;
    STD_TORCH_CHECK(problem.query_tokens() == q.size(1) && problem.key_tokens() == k.size(1) && k.size(1) == v.size(1),
                    "q_thw and k_thw must stand for the tokens of q, and of k and v");
    for (int axis = 0; axis < 3; axis++) {
      problem.terms[axis].first = problem.terms_size;
      if (terms[axis]) add_terms(*terms[axis], axis, backward);
    }
  }

  PooledAttention problem{};

 private:
  void add_terms(const Tensor& term, int axis, bool backward) {
    int64_t queries = problem.queries.of(axis), keys = problem.keys.of(axis);
    STD_TORCH_CHECK(term.is_contiguous() && term.dim() == 3 && term.size(0) == queries && term.size(1) == keys &&
                        term.size(2) == problem.head_dim &&
                        term.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
                    "relative terms must be contiguous [queries, keys, head_dim], float32 (float64 with float64 q)");
    memory_[axis][0] = padded_terms<T>(term, true);
    problem.terms[axis].transposed = memory_[axis][0].data();
    if (backward) memory_[axis][1] = padded_terms<T>(term, false);
    problem.terms[axis].straight = memory_[axis][1].data();
    problem.terms_size += queries * keys;
  }

  std::vector<T> memory_[3][2];
};

// The gradient of an axis' terms: the sum of the shares, in their order.
template <class T>
Tensor sum_of_shares(const Tensor& q, const Table& term, const PooledAttention& problem, int axis, const T* shares) {
  if (!term) return torch::stable::new_empty(q, {0}, wide_type(q));
  Tensor sum = torch::stable::new_empty(q, term->sizes(), wide_type(q));
  T* to = static_cast<T*>(sum.data_ptr());
  int64_t stride = padded_row<T>(problem.head_dim), size = problem.terms_size * stride;
  shares += problem.terms[axis].first * stride;
  torch::stable::parallel_for(0, sum.size(0) * sum.size(1), 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t d = 0; d < problem.head_dim; d++) {
        T total = 0;
        for (int64_t share = 0; share < problem.shares(); share++) total += shares[share * size + row * stride + d];
        to[row * problem.head_dim + d] = total;
      }
  });
  return sum;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Table rel_t, Table rel_h, Table rel_w, Axes q_thw,
                                   Axes k_thw, bool has_cls, int64_t residual, double scale) {
  Element element = element_of(q);
  Tensor out = torch::stable::new_empty(q, q.sizes()), statistic = torch::stable::new_empty(q, {0}, wide_type(q));
  if (out.numel() == 0) return {out, statistic};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(q, k, v, {rel_t, rel_h, rel_w}, q_thw, k_thw, has_cls, residual, scale, false);
    PooledAttention& problem = call.problem;
    problem.out = view_of(out);
    torch::stable::parallel_for(
        0, problem.batch * problem.heads * problem.blocks(), 1,
        [&](int64_t begin, int64_t end) { kernels().forward[int(element)](problem, begin, end); });
  };
  element == Element::DOUBLE ? run(double()) : run(float());
  return {out, statistic};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients backward_as(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Table (&terms)[3],
                      const Axes& q_thw, const Axes& k_thw, bool has_cls, int64_t residual, double scale) {
  Tensor dq = torch::stable::new_empty(q, q.sizes()), dk = torch::stable::new_empty(k, k.sizes()),
         dv = torch::stable::new_empty(v, v.sizes());
  Call<T> call(q, k, v, terms, q_thw, k_thw, has_cls, residual, scale, true);
  PooledAttention& problem = call.problem;
  problem.dout = view_of(dout), problem.dq = view_of(dq), problem.dk = view_of(dk), problem.dv = view_of(dv);
  int64_t heads = problem.batch * problem.heads, stride = padded_row<T>(problem.head_dim);
  int64_t keys = problem.parts() > 1 ? problem.parts() * heads * 2 * problem.key_tokens() : 0;
  std::unique_ptr<T[]> dkv(new T[keys * stride]);
  std::unique_ptr<T[]> dterms(new T[problem.shares() * problem.terms_size * stride]);
  Partial partial{dkv.get(), dterms.get()};
  Element element = element_of(q);
  torch::stable::parallel_for(0, problem.shares(), 1, [&](int64_t begin, int64_t end) {
    kernels().backward[int(element)](problem, partial, begin, end);
  });
  if (problem.parts() > 1)
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      kernels().combine[int(element)](problem, partial, begin, end);
    });
  auto sum = [&](int axis) { return sum_of_shares<T>(q, terms[axis], problem, axis, dterms.get()); };
  return {dq, dk, dv, sum(0), sum(1), sum(2)};
}

Gradients backward(Tensor dout, Tensor q, Tensor k, Tensor v, Table rel_t, Table rel_h, Table rel_w, Tensor statistic,
                   Axes q_thw, Axes k_thw, bool has_cls, int64_t residual, double scale) {
  auto run = wide_type(q) == ScalarType::Double ? backward_as<double> : backward_as<float>;
  return run(dout, q, k, v, {rel_t, rel_h, rel_w}, q_thw, k_thw, has_cls, residual, scale);
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("pooled_attention_forward", TORCH_BOX(&forward));
  m.impl("pooled_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
