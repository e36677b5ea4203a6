// The operator balanced_clusters on CUDA tensors.
#include "balanced_clusters.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

namespace vitkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t WORD = 16;  // bytes

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::FLOAT;
    case ScalarType::Half: return Element::HALF;
    case ScalarType::BFloat16: return Element::BFLOAT16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

// Whether every row of x begins on a whole word and has whole chunks.
bool aligned(const Tensor& x) {
  bool whole = x.size(3) % CHUNK == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % WORD == 0;
  for (int i = 0; i < 3; i++) whole = whole && (x.size(i) == 1 || x.stride(i) * x.element_size() % WORD == 0);
  return whole;
}

// x as the kernel reads it: itself, or a copy, of float32 for float64, and with features of 0 up to whole chunks.
Tensor prepared(Tensor x) {
  if (x.scalar_type() == ScalarType::Double) x = torch::stable::to(x, ScalarType::Float);
  if (aligned(x)) return x;
  return torch::stable::contiguous(torch::stable::pad(x, {0, (CHUNK - x.size(3) % CHUNK) % CHUNK}));
}

Tensor run(Tensor x, int64_t leaf_size, int64_t iterations, double temperature) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1),
                  "expected [B, N, heads, D] with unit stride in D");
  int64_t batch = x.size(0), tokens = x.size(1), heads = x.size(2), features = x.size(3);
  STD_TORCH_CHECK(tokens <= MAX_TOKENS && features <= MAX_FEATURES && batch * heads <= INT32_MAX,
                  "the CUDA kernel of balanced_clusters takes at most ", MAX_TOKENS, " tokens, ", MAX_FEATURES,
                  " features and 2^31 - 1 heads of all images, got [B, N, heads, D] = [", batch, ", ", tokens, ", ",
                  heads, ", ", features, "]; backend='reference' takes any");
  STD_TORCH_CHECK(leaf_size >= 1 && iterations >= 0 && iterations <= INT32_MAX,
                  "expected leaf_size >= 1 and iterations >= 0");
  int device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(x, {batch, heads, tokens}, ScalarType::Int);
  if (out.numel() == 0) return out;

  x = prepared(x);
  Launch settings = plan(tokens, int(x.size(3)), x.element_size(), shared_memory_of(device));
  int64_t words = settings.workspace ? batch * heads * words_of_order(tokens) : 0;
  Tensor workspace = torch::stable::new_empty(x, {words}, ScalarType::Int);
  Problem problem{};
  problem.x = x.data_ptr();
  problem.stride_b = x.stride(0), problem.stride_n = x.stride(1), problem.stride_h = x.stride(2);
  problem.out = static_cast<int32_t*>(out.data_ptr());
  problem.workspace = words ? static_cast<uint32_t*>(workspace.data_ptr()) : nullptr;
  problem.blocks = batch * heads, problem.heads = heads;
  problem.tree = Tree::of(tokens, leaf_size);
  problem.features = int(x.size(3)), problem.iterations = int(iterations);
  problem.sharpness = sharpness(temperature);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(problem, element_of(x), settings, device, stream);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) { m.impl("balanced_clusters", TORCH_BOX(&run)); }

}  // namespace
}  // namespace vitkernels

// Python finds the library by the name of an extension module; it has nothing to initialise.
extern "C" __attribute__((visibility("default"))) void* PyInit__CUDA() { return nullptr; }
