// The operator pool_tokens on CPU tensors: outputs, the division of the work, the parameters and their gradients.
#include "pool_tokens.h"

#include <algorithm>
#include <new>
#include <optional>
#include <vector>

#include "operator.h"

namespace vitkernels {
namespace {

// Products that are worth waking a thread for.
constexpr int64_t GRAIN = 256 * 1024;
// Bytes of gradients of windows that a backward pass holds for each thread, so that they stay in its cache (or one
// image's).
constexpr int64_t HELD = 512 * 1024;
// An image's windows are divided into shares by their number alone, so that the gradients of the parameters have the
// same bits for any number of threads.
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

// Memory that begins at a cache line.
struct Lines {
  char* const data;

  explicit Lines(int64_t bytes) : data((char*)::operator new(bytes, std::align_val_t{64})) {}
  Lines(const Lines&) = delete;
  ~Lines() { ::operator delete(data, std::align_val_t{64}); }
};

// The parameters as the kernels read them. A maximum has the number of each tap in its row, to be compared with the
// winner's; an average has equal weights.
template <class T>
void prepare(const PoolTokens& problem, const MaybeTensor& weight, const MaybeTensor (&norm)[2],
             std::optional<Lines>& memory) {
  int64_t taps = problem.taps(), size = problem.row_size();
  memory.emplace((taps + 2) * size * sizeof(T));
  T* to = reinterpret_cast<T*>(memory->data);
  std::fill_n(to, (taps + 2) * size, T(0));
  const T* from = weight ? static_cast<const T*>(weight->data_ptr()) : nullptr;
  for (int64_t tap = 0; tap < taps; tap++)
    for (int64_t d = 0; d < problem.head_dim; d++)
      to[tap * size + d] = from ? from[d * taps + tap] : problem.maximum ? T(tap) : T(1) / T(taps);
  for (int i = 0; i < 2 && problem.norm; i++)
    std::copy_n(static_cast<const T*>(norm[i]->data_ptr()), problem.head_dim, to + (taps + i) * size);
}

// A call, and the parameters that its description points to.
struct Call {
  PoolTokens problem{};
  Element element;
  ScalarType wide;
  std::optional<Lines> parameters;

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
    wide == ScalarType::Double ? prepare<double>(p, weight, norm, parameters)
                               : prepare<float>(p, weight, norm, parameters);
    p.parameters = parameters->data;
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

// sum += the parts, one after the other, which become zero.
template <class T>
void add_parts(std::vector<char>& sum, std::vector<char>& parts) {
  int64_t size = sum.size() / sizeof(T);
  T *to = reinterpret_cast<T*>(sum.data()), *from = reinterpret_cast<T*>(parts.data());
  for (T* end = from + parts.size() / sizeof(T); size && from < end; from += size)
    for (int64_t i = 0; i < size; i++) to[i] += from[i], from[i] = 0;
}

// gradients: [gradients(), row_size()]
template <class T>
void store_gradients(const PoolTokens& p, const std::vector<char>& gradients, const Tensor& dweight,
                     const Tensor& dnorm) {
  int64_t size = p.row_size(), taps = p.learned ? p.taps() : 0;
  const T* from = reinterpret_cast<const T*>(gradients.data());
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

  bool wide = call.wide == ScalarType::Double;
  int64_t element_size = wide ? 8 : 4, image_bytes = windows * p.heads * p.pooled_size() * element_size;
  p.images = std::clamp<int64_t>(HELD * torch::stable::get_num_threads() / image_bytes, 1, batch);
  Lines dpooled(p.images * image_bytes);
  p.dpooled = dpooled.data;
  int64_t shares = std::clamp<int64_t>(windows * p.heads / SHARE, 1, std::min(SHARES, p.rows()));  // of an image
  std::vector<char> gradients(p.gradients() * p.row_size() * element_size), parts(p.images * shares * gradients.size());

  PoolBackwardWindows to_windows = kernels().backward_windows[int(call.element)];
  PoolBackwardTokens to_tokens = kernels().backward_tokens[int(call.element)];
  for (int64_t first = 0, last; first < batch; first = last) {
    last = std::min(first + p.images, batch);
    torch::stable::parallel_for(first * shares, last * shares, 1, [&](int64_t begin, int64_t end) {
      to_windows(p, shares, begin, end, parts.data() + (begin - first * shares) * gradients.size());
    });
    wide ? add_parts<double>(gradients, parts) : add_parts<float>(gradients, parts);
    torch::stable::parallel_for(first * p.rows_of_tokens(), last * p.rows_of_tokens(),
                                call.grain(p.w.tokens, p.t.overlap() * p.h.overlap() * p.w.overlap()),
                                [&](int64_t begin, int64_t end) { to_tokens(p, begin, end); });
  }
  wide ? store_gradients<double>(p, gradients, dweight, dnorm) : store_gradients<float>(p, gradients, dweight, dnorm);
  return {dweight, dnorm};
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("pool_tokens_forward", TORCH_BOX(&forward));
  m.impl("pool_tokens_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vitkernels
