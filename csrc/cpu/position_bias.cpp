// The operator dynamic_position_bias on CPU tensors: outputs, the division of the work, the sum of the gradients.
#include "position_bias.h"

#include <algorithm>
#include <vector>

#include "operator.h"

namespace vitkernels {
namespace {

// Offsets are divided into shares by their number alone, so that the gradients have the same bits for any number of threads. One
// share covers the table of a 7 x 7 group, for which waking threads costs more than the work.
constexpr int64_t SHARE = 256, SHARES = 64;

const PositionBiasKernels& kernels() {
  static PositionBiasKernels (*const make[])() = VITKERNELS_LEVELS(position_bias_kernels);
  static const PositionBiasKernels chosen = make[int(capability())]();
  return chosen;
}

// The parameters, made contiguous: `mlp` afterwards owns what the problem points to.
PositionBias describe(std::vector<Tensor>& mlp, bool residual, int64_t group_h, int64_t group_w) {
  STD_TORCH_CHECK(mlp.size() == POSITION_BIAS_PARAMETERS, "dynamic_position_bias takes 14 parameters, got ", mlp.size());
  STD_TORCH_CHECK(group_h >= 1 && group_w >= 1, "groups have at least one token");
  ScalarType type = mlp[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "dynamic_position_bias takes float32 or float64");
  PositionBias problem{{}, mlp[1].numel(), mlp[13].numel(), group_h, group_w, residual};
  for (int i = 0; i < POSITION_BIAS_PARAMETERS; i++) {
    int64_t rows = i == 12 || i == 13 ? problem.heads : problem.hidden;
    int64_t columns = i == 0 ? 2 : i == 4 || i == 8 || i == 12 ? problem.hidden : 1;
    STD_TORCH_CHECK(mlp[i].numel() == rows * columns && mlp[i].scalar_type() == type, "parameter ", i, " has the wrong size or dtype");
    mlp[i] = torch::stable::contiguous(mlp[i]);
    problem.parameters[i] = mlp[i].data_ptr();
  }
  return problem;
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

Tensor forward(std::vector<Tensor> mlp, bool residual, int64_t group_h, int64_t group_w) {
  PositionBias problem = describe(mlp, residual, group_h, group_w);
  Tensor table = torch::stable::new_empty(mlp[0], {problem.heads, 2 * group_h - 1, 2 * group_w - 1});
  PositionBiasForward kernel = kernels().forward[is_double(table)];
  torch::stable::parallel_for(
      0, problem.offsets(), SHARE, [&](int64_t begin, int64_t end) { kernel(problem, begin, end, table.data_ptr()); });
  return table;
}

// Each gradient is the sum of its parts, [shares, total], in their order.
template <class T>
void sum_parts(const std::vector<Tensor>& gradients, const std::vector<char>& memory, int64_t shares, int64_t total) {
  const T* from = reinterpret_cast<const T*>(memory.data());
  for (const Tensor& gradient : gradients) {
    T* to = static_cast<T*>(gradient.data_ptr());
    for (int64_t i = 0; i < gradient.numel(); i++, from++) {
      T sum = 0;
      for (int64_t share = 0; share < shares; share++) sum += from[share * total];
      to[i] = sum;
    }
  }
}

std::vector<Tensor> backward(Tensor dtable, std::vector<Tensor> mlp, bool residual, int64_t group_h, int64_t group_w) {
  PositionBias problem = describe(mlp, residual, group_h, group_w);
  int64_t offsets = problem.offsets(), total = 0;
  STD_TORCH_CHECK(
      dtable.numel() == problem.heads * offsets && dtable.scalar_type() == mlp[0].scalar_type(),
      "dtable must be [heads, 2Gh-1, 2Gw-1], of the parameters' dtype");
  dtable = torch::stable::contiguous(dtable);
  std::vector<Tensor> gradients;
  for (const Tensor& parameter : mlp) {
    gradients.push_back(torch::stable::empty_like(parameter));
    total += parameter.numel();
  }
  int64_t shares = std::min((offsets + SHARE - 1) / SHARE, SHARES);
  int64_t part = total * dtable.element_size();
  std::vector<char> parts(shares * part);
  PositionBiasBackward kernel = kernels().backward[is_double(dtable)];
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      kernel(problem, i * offsets / shares, (i + 1) * offsets / shares, dtable.data_ptr(), parts.data() + i * part);
  });
  is_double(dtable) ? sum_parts<double>(gradients, parts, shares, total) : sum_parts<float>(gradients, parts, shares, total);
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("dynamic_position_bias_forward", TORCH_BOX(&forward));
  m.impl("dynamic_position_bias_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
