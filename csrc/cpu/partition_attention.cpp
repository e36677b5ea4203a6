// The operator partition_attention on CPU tensors: outputs, the division of the work, the bias table and its gradient.
#include "partition_attention.h"

#include <optional>
#include <vector>

#include "operator.h"

namespace vitkernels {
namespace {

const PartitionAttentionKernels& kernels() {
  static PartitionAttentionKernels (*const make[])() = VITKERNELS_LEVELS(partition_attention_kernels);
  static const PartitionAttentionKernels chosen = make[int(capability())]();
  return chosen;
}

// A bias table in the order in which the kernels read it: the offsets negated, which reverses each head's.
template <class T>
std::vector<char> reversed(const Tensor& bias, int64_t size) {
  std::vector<char> memory(bias.numel() * sizeof(T) + VECTOR_SLACK);
  const T* from = static_cast<const T*>(bias.data_ptr());
  T* to = reinterpret_cast<T*>(memory.data());
  for (int64_t i = 0; i < bias.numel(); i++) to[i] = from[i / size * size + size - 1 - i % size];
  return memory;
}

// dbias = the sum of the `parts`, [parts, heads, size], in their order and turned back.
template <class T>
void sum_parts(const Tensor& dbias, const std::vector<char>& memory, int64_t size) {
  int64_t numel = dbias.numel(), parts = memory.size() / (numel * sizeof(T));
  const T* from = reinterpret_cast<const T*>(memory.data());
  T* to = static_cast<T*>(dbias.data_ptr());
  for (int64_t i = 0; i < numel; i++) {
    T sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += from[part * numel + i / size * size + size - 1 - i % size];
    to[i] = sum;
  }
}

struct Geometry {
  int64_t group_h, group_w, interval_h, interval_w, shift_h, shift_w;
};

Geometry geometry_of(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 6, "geometry is group, interval and shift, each along height and width, got ",
                  sizes.size(), " sizes");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
}

PartitionAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Geometry& g, double scale) {
  PartitionAttention problem{};
  problem.q = view_of(q), problem.k = view_of(k), problem.v = view_of(v);
  problem.map = {{q.size(1), g.group_h, g.interval_h, g.shift_h}, {q.size(2), g.group_w, g.interval_w, g.shift_w}};
  problem.bias_size = (2 * g.group_h - 1) * (2 * g.group_w - 1);
  problem.head_dim = q.size(4);
  problem.scale = scale;
  problem.work = {q.size(0) * problem.map.groups(), q.size(3)};
  return problem;
}

std::vector<char> prepared(const std::optional<Tensor>& bias, const Tensor& q, int64_t size) {
  if (!bias) return {};
  bool wide = q.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == q.size(3) * size &&
                      bias->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "bias must be a contiguous [heads, 2Gh-1, 2Gw-1], float32 (float64 with float64 inputs)");
  return wide ? reversed<double>(*bias, size) : reversed<float>(*bias, size);
}

void check_no_mlp(const std::vector<Tensor>& mlp) {
  STD_TORCH_CHECK(mlp.empty(),
                  "the C++ kernels take the position bias as a table; evaluate the MLP first (form='table')");
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::vector<Tensor> mlp,
                                   bool residual, std::vector<int64_t> geometry, double scale) {
  check_no_mlp(mlp);
  Geometry g = geometry_of(geometry);
  Element element = element_of(q);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor statistic =
      torch::stable::new_empty(q, {0}, element == Element::DOUBLE ? ScalarType::Double : ScalarType::Float);
  PartitionAttention problem = describe(q, k, v, g, scale);
  std::vector<char> table = prepared(bias, q, problem.bias_size);
  problem.bias = bias ? table.data() : nullptr;
  problem.out = view_of(out);
  if (out.numel() == 0) return {out, statistic};

  Forward kernel = kernels().forward[int(element)];
  torch::stable::parallel_for(0, problem.work.shares(), 1,
                              [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  return {out, statistic};
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                    std::vector<Tensor> mlp, bool residual, Tensor statistic,
                                    std::vector<int64_t> geometry, double scale) {
  check_no_mlp(mlp);
  Geometry g = geometry_of(geometry);
  Element element = element_of(q);
  ScalarType wide = element == Element::DOUBLE ? ScalarType::Double : ScalarType::Float;
  Tensor dqkv = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), 3, q.size(3), q.size(4)});
  PartitionAttention problem = describe(q, k, v, g, scale);
  Tensor dbias = bias ? torch::stable::new_empty(q, {q.size(3), 2 * g.group_h - 1, 2 * g.group_w - 1}, wide)
                      : torch::stable::new_empty(q, {0}, wide);
  std::vector<char> table = prepared(bias, q, problem.bias_size);
  problem.bias = bias ? table.data() : nullptr;
  problem.dout = view_of(dout);
  problem.dq = view_of_part(dqkv, 0), problem.dk = view_of_part(dqkv, 1), problem.dv = view_of_part(dqkv, 2);
  if (dqkv.numel() == 0) return {dqkv, torch::stable::zero_(dbias)};

  std::vector<char> parts(problem.work.group_parts() * dbias.numel() * dbias.element_size());
  Backward kernel = kernels().backward[int(element)];
  torch::stable::parallel_for(0, problem.work.shares(), 1, [&](int64_t begin, int64_t end) {
    kernel(problem, begin, end, bias ? parts.data() : nullptr);
  });
  if (bias && wide == ScalarType::Double) sum_parts<double>(dbias, parts, problem.bias_size);
  if (bias && wide == ScalarType::Float) sum_parts<float>(dbias, parts, problem.bias_size);
  return {dqkv, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("partition_attention_forward", TORCH_BOX(&forward));
  m.impl("partition_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
