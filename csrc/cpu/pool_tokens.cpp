// The operator pool_tokens on CPU tensors: outputs, the division of the work, the parameters and their gradients.
#include "pool_tokens.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "operator.h"

namespace vitkernels {
namespace {

// Products that are worth waking a thread for.
constexpr int64_t GRAIN = 256 * 1024;
// Bytes of gradients of windows that a backward pass holds, so that they stay in a cache (or one image's).
constexpr int64_t HELD = 8 << 20;
// Windows are divided into shares by their number alone, so that the gradients of the parameters have the same bits for
// any number of threads.
constexpr int64_t SHARE = 64, SHARES = 64;  // windows and heads at least, shares at most

using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

const PoolTokensKernels& kernels() {
  static PoolTokensKernels (*const make[])() = VITKERNELS_LEVELS(pool_tokens_kernels);
  static const PoolTokensKernels chosen = make[int(capability())]();
  return chosen;
}

PoolAxis axis_of(int64_t i, const Ints& thw, const Ints& kernel, const Ints& stride, const Ints& padding) {
  for (const Ints* list : {&thw, &kernel, &stride, &padding})
    STD_TORCH_CHECK(list->size() == 3, "thw, kernel, stride and padding have an entry for time, height and width");
  PoolAxis axis{thw[i], kernel[i], stride[i], padding[i]};
  STD_TORCH_CHECK(
      axis.tokens >= 1 && axis.kernel >= 1 && axis.stride >= 1 && axis.padding >= 0 &&
          2 * axis.padding <= axis.kernel && axis.kernel <= axis.tokens + 2 * axis.padding,
      "thw, kernel and stride must be at least 1, padding at most half the kernel, and the kernel at most the "
      "padded map");
  return axis;
}

void check_parameter(const MaybeTensor& parameter, int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(
      !parameter || (parameter->is_contiguous() && parameter->numel() == numel && parameter->scalar_type() == type),
      "weight [head_dim, taps] and the norm's [head_dim] must be contiguous, float32 (float64 with float64 inputs)");
}

// The parameters as the kernels read them. A maximum has the number of each tap in its row, to be compared with the
// winner's; an average has equal weights.
template <class T>
std::vector<char> prepared(const PoolTokens& problem, const MaybeTensor& weight, const MaybeTensor (&norm)[2]) {
  int64_t taps = problem.taps(), size = problem.row_size();
  std::vector<char> memory((taps + 2) * size * sizeof(T));
  T* to = reinterpret_cast<T*>(memory.data());
  const T* from = weight ? static_cast<const T*>(weight->data_ptr()) : nullptr;
  for (int64_t tap = 0; tap < taps; tap++)
    for (int64_t d = 0; d < problem.head_dim; d++)
      to[tap * size + d] = from ? from[d * taps + tap] : problem.maximum ? T(tap) : T(1) / T(taps);
  for (int i = 0; i < 2 && problem.norm; i++)
    std::copy_n(static_cast<const T*>(norm[i]->data_ptr()), problem.head_dim, to + (taps + i) * size);
  return memory;
}

// A call, and the parameters that its description points to.
struct Call {
  PoolTokens problem{};
  Element element;
  ScalarType wide;
  std::vector<char> parameters;

  Call(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
       const Ints& thw, const Ints& kernel, const Ints& stride, const Ints& padding, bool maximum, bool has_cls,
       double eps)
      : element(element_of(x)), wide(element == Element::DOUBLE ? ScalarType::Double : ScalarType::Float) {
    PoolTokens& p = problem;
    p.x = view_of(x);
    p.t = axis_of(0, thw, kernel, stride, padding);
    p.h = axis_of(1, thw, kernel, stride, padding);
    p.w = axis_of(2, thw, kernel, stride, padding);
    p.heads = x.size(2), p.head_dim = x.size(3);
    p.maximum = maximum, p.cls = has_cls, p.norm = norm_weight.has_value(), p.learned = weight.has_value(), p.eps = eps;
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == has_cls + p.rows_of_tokens() * p.w.tokens,
                    "expected [B, N, heads, head_dim] with the tokens of thw and of has_cls");
    STD_TORCH_CHECK(p.norm == norm_bias.has_value() && !(maximum && weight),
                    "the norm has a weight and a bias, a maximum no weight");
    check_parameter(weight, p.head_dim * p.taps(), wide);
    check_parameter(norm_weight, p.head_dim, wide);
    check_parameter(norm_bias, p.head_dim, wide);
    const MaybeTensor norm[2] = {norm_weight, norm_bias};
    parameters = wide == ScalarType::Double ? prepared<double>(p, weight, norm) : prepared<float>(p, weight, norm);
    p.parameters = parameters.data();
  }

  // Rows that are worth waking a thread for, of so many sums of `taps` products.
  int64_t grain(int64_t sums, int64_t taps) const {
    return 1 + GRAIN / (sums * problem.heads * problem.row_size() * (taps + 4));
  }
};

Tensor forward(Tensor x, MaybeTensor weight, MaybeTensor norm_weight, MaybeTensor norm_bias, Ints thw, Ints kernel,
               Ints stride, Ints padding, bool maximum, bool has_cls, double eps) {
  Call call(x, weight, norm_weight, norm_bias, thw, kernel, stride, padding, maximum, has_cls, eps);
  PoolTokens& p = call.problem;
  int64_t tokens = has_cls + p.t.windows() * p.h.windows() * p.w.windows();
  Tensor out = torch::stable::new_empty(x, {x.size(0), tokens, p.heads, p.head_dim});
  p.out = view_of(out);
  if (out.numel() == 0) return out;
  PoolForward run = kernels().forward[int(call.element)];
  torch::stable::parallel_for(0, x.size(0) * p.rows(), call.grain(p.w.windows(), p.taps()),
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return out;
}

// The sum of the parts, [shares, gradients, row_size], in the order of the shares, in the first of them.
template <class T>
void sum_parts(T* parts, int64_t shares, int64_t size) {
  for (int64_t share = 1; share < shares; share++)
    for (int64_t i = 0; i < size; i++) parts[i] += parts[share * size + i];
}

template <class T>
void store_gradients(const PoolTokens& p, void* parts, int64_t shares, const Tensor& dweight, const Tensor& dnorm) {
  int64_t size = p.row_size(), taps = p.learned ? p.taps() : 0;
  T* from = static_cast<T*>(parts);
  sum_parts(from, shares, p.gradients() * size);
  for (int64_t d = 0; d < p.head_dim; d++)
    for (int64_t tap = 0; tap < taps; tap++) static_cast<T*>(dweight.data_ptr())[d * taps + tap] = from[tap * size + d];
  for (int64_t i = 0; i < 2 && p.norm; i++)
    std::copy_n(from + (taps + i) * size, p.head_dim, static_cast<T*>(dnorm.data_ptr()) + i * p.head_dim);
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor x, MaybeTensor weight, MaybeTensor norm_weight,
                                    MaybeTensor norm_bias, Ints thw, Ints kernel, Ints stride, Ints padding,
                                    bool maximum, bool has_cls, double eps, Tensor dx) {
  Call call(x, weight, norm_weight, norm_bias, thw, kernel, stride, padding, maximum, has_cls, eps);
  PoolTokens& p = call.problem;
  int64_t batch = x.size(0), windows = p.t.windows() * p.h.windows() * p.w.windows();
  STD_TORCH_CHECK(dx.scalar_type() == x.scalar_type() && dout.scalar_type() == x.scalar_type() && dx.dim() == 4 &&
                      std::equal(dx.sizes().begin(), dx.sizes().end(), x.sizes().begin()) && dout.dim() == 4 &&
                      dout.size(0) == batch && dout.size(1) == has_cls + windows && dout.size(2) == p.heads &&
                      dout.size(3) == p.head_dim,
                  "dx must be like x, dout like the output");
  p.dout = view_of(dout), p.dx = view_of(dx);
  Tensor dweight = weight ? torch::stable::new_empty(x, {p.head_dim, p.taps()}, call.wide)
                          : torch::stable::new_empty(x, {0}, call.wide);
  Tensor dnorm =
      p.norm ? torch::stable::new_empty(x, {2, p.head_dim}, call.wide) : torch::stable::new_empty(x, {0}, call.wide);
  if (x.numel() == 0) return {torch::stable::zero_(dweight), torch::stable::zero_(dnorm)};

  int64_t element_size = call.wide == ScalarType::Double ? 8 : 4;
  int64_t image_bytes = windows * p.heads * p.pooled_size() * element_size;
  p.images = std::clamp(HELD / image_bytes, int64_t(1), batch);
  // not a vector: nobody reads what was not written
  std::unique_ptr<char[]> dpooled(new char[p.images * image_bytes + 64]);
  p.dpooled = dpooled.get() + (64 - reinterpret_cast<uintptr_t>(dpooled.get()) % 64);
  int64_t shares = std::clamp(p.images * windows * p.heads / SHARE, int64_t(1), std::min(SHARES, p.images * p.rows()));
  int64_t part = p.gradients() * p.row_size() * element_size;
  std::vector<char> parts(shares * part);

  PoolBackwardWindows to_windows = kernels().backward_windows[int(call.element)];
  PoolBackwardTokens to_tokens = kernels().backward_tokens[int(call.element)];
  for (int64_t first = 0, last; first < batch; first = last) {
    last = std::min(first + p.images, batch);
    int64_t start = first * p.rows(), rows = (last - first) * p.rows();
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        to_windows(p, start + i * rows / shares, start + (i + 1) * rows / shares, parts.data() + i * part);
    });
    torch::stable::parallel_for(first * p.rows_of_tokens(), last * p.rows_of_tokens(),
                                call.grain(p.w.tokens, p.t.overlap() * p.h.overlap() * p.w.overlap()),
                                [&](int64_t begin, int64_t end) { to_tokens(p, begin, end); });
  }
  if (call.wide == ScalarType::Double)
    store_gradients<double>(p, parts.data(), shares, dweight, dnorm);
  else
    store_gradients<float>(p, parts.data(), shares, dweight, dnorm);
  return {dweight, dnorm};
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("pool_tokens_forward", TORCH_BOX(&forward));
  m.impl("pool_tokens_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
