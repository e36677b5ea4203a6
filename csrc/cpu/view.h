// Tensors as operators hand them to the kernels of a vector level.
#pragma once

#include <cstdint>

namespace vitkernels {

enum class Element { FLOAT, DOUBLE, HALF, BFLOAT16 };

// A [B, H, W, heads, head_dim] tensor with unit stride in its last dimension; strides in elements. One of tokens in a
// row, [B, N, heads, head_dim], has N in the place of W.
struct View {
  char* data;
  int64_t batch, y, x, head;
};

}  // namespace vitkernels
