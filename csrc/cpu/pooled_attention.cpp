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

// Along time, height and width: a table [length, head_dim], and for each query and key the row that they meet.
struct Positions {
  Table tables[3], indices[3];
};

const PooledAttentionKernels& kernels() {
  static PooledAttentionKernels (*const make[])() = VITKERNELS_LEVELS(pooled_attention_kernels);
  static const PooledAttentionKernels chosen = make[int(capability())]();
  return chosen;
}

ScalarType wide_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An order of a table's rows, some more than once, in which those that a query meets follow each other.
struct Order {
  std::vector<int64_t> rows, first;  // rows of the table; per query, where its own begin
};

// index: [queries, keys], rows of a table of `length`. Where each query's are a fixed step apart, a table needs its own
// rows once each: those a step apart in turn, from every one of the first rows. Else every query has rows of its own.
Order order_of(const int64_t* index, int64_t queries, int64_t keys, int64_t length) {
  int64_t step = keys > 1 ? index[1] - index[0] : 1;
  bool even = step != 0;
  for (int64_t i = 0; i < queries; i++)
    for (int64_t j = 1; j < keys; j++) even &= index[i * keys + j] - index[i * keys + j - 1] == step;
  Order order;
  if (!even) {
    order.rows.assign(index, index + queries * keys);
    for (int64_t i = 0; i < queries; i++) order.first.push_back(i * keys);
    return order;
  }
  std::vector<int64_t> place(length);
  for (int64_t start = 0; start < std::min(std::abs(step), length); start++) {
    int64_t last = start + (length - 1 - start) / std::abs(step) * std::abs(step);
    for (int64_t row = step > 0 ? start : last; row >= 0 && row < length; row += step) {
      place[row] = order.rows.size();
      order.rows.push_back(row);
    }
  }
  for (int64_t i = 0; i < queries; i++) order.first.push_back(place[index[i * keys]]);
  return order;
}

// What the kernels read of a table.
template <class T>
struct Rows {
  Order order;
  std::vector<T> straight, transposed;

  Terms of(const Tensor& table, const Tensor& index) {
    int64_t head_dim = table.size(1), row = padded_row<T>(head_dim);
    order = order_of(static_cast<const int64_t*>(index.data_ptr()), index.size(0), index.size(1), table.size(0));
    int64_t count = order.rows.size();
    int64_t stride = padded_row<T>(count) | 64 / sizeof(T);  // an odd number of cache lines: all sets of the cache
    straight.resize(count * row), transposed.resize(head_dim * stride + padded_row<T>(1));
    for (int64_t i = 0; i < count; i++) {
      const T* from = static_cast<const T*>(table.data_ptr()) + order.rows[i] * head_dim;
      for (int64_t d = 0; d < head_dim; d++) straight[i * row + d] = transposed[d * stride + i] = from[d];
    }
    return {straight.data(), transposed.data(), order.first.data(), count, stride, 0};
  }
};

// The problem, and the memory of its terms.
template <class T>
class Call {
 public:
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Positions& positions, const Axes& q_thw,
       const Axes& k_thw, bool has_cls, int64_t residual, double scale) {
    STD_TORCH_CHECK(q_thw.size() == 3 && k_thw.size() == 3, "q_thw and k_thw must be (T, H, W)");
    problem.q = view_of(q), problem.k = view_of(k), problem.v = view_of(v);
    problem.queries = {q_thw[0], q_thw[1], q_thw[2]}, problem.keys = {k_thw[0], k_thw[1], k_thw[2]};
    problem.batch = q.size(0), problem.heads = q.size(2), problem.head_dim = q.size(3);
    problem.cls = has_cls, problem.residual = residual, problem.scale = scale;
    STD_TORCH_CHECK(problem.query_tokens() == q.size(1) && problem.key_tokens() == k.size(1) && k.size(1) == v.size(1),
                    "q_thw and k_thw must stand for the tokens of q, and of k and v");
    for (int axis = 0; axis < 3; axis++)
      if (positions.tables[axis]) add_terms(positions, axis);
  }

  // The gradient of an axis' table: the sum of the shares, in their order.
  Tensor gradient(const Positions& positions, const Tensor& q, int axis, const T* shares) const {
    if (!positions.tables[axis]) return torch::stable::new_empty(q, {0}, wide_type(q));
    Tensor sum = torch::stable::new_zeros(q, positions.tables[axis]->sizes(), wide_type(q));
    const Terms& terms = problem.terms[axis];
    int64_t stride = padded_row<T>(problem.head_dim), size = problem.terms_size * stride;
    shares += terms.place * stride;
    for (int64_t row = 0; row < terms.count; row++) {
      T* to = static_cast<T*>(sum.data_ptr()) + rows_[axis].order.rows[row] * problem.head_dim;
      for (int64_t share = 0; share < problem.shares(); share++)
        for (int64_t d = 0; d < problem.head_dim; d++) to[d] += shares[share * size + row * stride + d];
    }
    return sum;
  }

  PooledAttention problem{};

 private:
  void add_terms(const Positions& positions, int axis) {
    STD_TORCH_CHECK(positions.indices[axis], "a table needs an index");
    const Tensor &table = *positions.tables[axis], &index = *positions.indices[axis];
    STD_TORCH_CHECK(table.is_contiguous() && table.dim() == 2 && table.size(1) == problem.head_dim &&
                        table.scalar_type() == (sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float),
                    "tables must be contiguous [length, head_dim], float32 (float64 with float64 q)");
    STD_TORCH_CHECK(index.is_contiguous() && index.dim() == 2 && index.size(0) == problem.queries.of(axis) &&
                        index.size(1) == problem.keys.of(axis) && index.scalar_type() == ScalarType::Long,
                    "an index must be contiguous [queries, keys], int64");
    const int64_t* row = static_cast<const int64_t*>(index.data_ptr());
    for (int64_t i = 0; i < index.numel(); i++)
      STD_TORCH_CHECK(row[i] >= 0 && row[i] < table.size(0), "an index must choose rows of its table");
    problem.terms[axis] = rows_[axis].of(table, index);
    problem.terms[axis].place = problem.terms_size;
    problem.terms_size += problem.terms[axis].count;
  }

  Rows<T> rows_[3];
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Table table_t, Table table_h, Table table_w,
                                   Table index_t, Table index_h, Table index_w, Axes q_thw, Axes k_thw, bool has_cls,
                                   int64_t residual, double scale) {
  Element element = element_of(q);
  Tensor out = torch::stable::new_empty(q, q.sizes()), statistic = torch::stable::new_empty(q, {0}, wide_type(q));
  if (out.numel() == 0) return {out, statistic};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    Positions positions{{table_t, table_h, table_w}, {index_t, index_h, index_w}};
    Call<T> call(q, k, v, positions, q_thw, k_thw, has_cls, residual, scale);
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
Gradients backward_as(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Positions& positions,
                      const Axes& q_thw, const Axes& k_thw, bool has_cls, int64_t residual, double scale) {
  Tensor dq = torch::stable::new_empty(q, q.sizes()), dk = torch::stable::new_empty(k, k.sizes()),
         dv = torch::stable::new_empty(v, v.sizes());
  Call<T> call(q, k, v, positions, q_thw, k_thw, has_cls, residual, scale);
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
  auto sum = [&](int axis) { return call.gradient(positions, q, axis, dterms.get()); };
  return {dq, dk, dv, sum(0), sum(1), sum(2)};
}

Gradients backward(Tensor dout, Tensor q, Tensor k, Tensor v, Table table_t, Table table_h, Table table_w,
                   Table index_t, Table index_h, Table index_w, Tensor statistic, Axes q_thw, Axes k_thw, bool has_cls,
                   int64_t residual, double scale) {
  auto run = wide_type(q) == ScalarType::Double ? backward_as<double> : backward_as<float>;
  Positions positions{{table_t, table_h, table_w}, {index_t, index_h, index_w}};
  return run(dout, q, k, v, positions, q_thw, k_thw, has_cls, residual, scale);
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("pooled_attention_forward", TORCH_BOX(&forward));
  m.impl("pooled_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
