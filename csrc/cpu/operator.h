// What the registrations of the operators share: elements, views, the kernels of the vector level in use.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "capability.h"
#include "view.h"

// What makes an operator's kernels, by Capability, of those levels that were compiled.
#if defined(VITKERNELS_HAS_AVX512)
#define VITKERNELS_LEVELS(make) {baseline::make, avx2::make, avx512::make}
#elif defined(VITKERNELS_HAS_AVX2)
#define VITKERNELS_LEVELS(make) {baseline::make, avx2::make}
#else
#define VITKERNELS_LEVELS(make) {baseline::make}
#endif

namespace vitkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::FLOAT;
    case ScalarType::Double:
      return Element::DOUBLE;
    case ScalarType::Half:
      return Element::HALF;
    case ScalarType::BFloat16:
      return Element::BFLOAT16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

// x: [B, H, W, heads, head_dim] or [B, N, heads, head_dim]
inline View view_of(const Tensor& x) {
  int64_t last = x.dim() - 1;
  STD_TORCH_CHECK((last == 3 || last == 4) && (x.stride(last) == 1 || x.size(last) <= 1),
                  "expected [B, H, W, heads, head_dim] or [B, N, heads, head_dim] with unit stride in head_dim");
  return {static_cast<char*>(x.data_ptr()), x.stride(0), last == 4 ? x.stride(1) : 0, x.stride(last - 2),
          x.stride(last - 1)};
}

// Third `part` (0, 1, 2 for q, k, v) of a contiguous [..., 3, heads, head_dim].
inline View view_of_part(const Tensor& qkv, int64_t part) {
  int64_t third = qkv.dim() - 3;
  char* data = static_cast<char*>(qkv.data_ptr()) + part * qkv.stride(third) * qkv.element_size();
  return {data, qkv.stride(0), third == 3 ? qkv.stride(1) : 0, qkv.stride(third - 1), qkv.stride(third + 1)};
}

}  // namespace vitkernels
