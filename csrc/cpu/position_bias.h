// What the operator hands to the kernels of a vector level.
#pragma once

#include <cstdint>

namespace vitkernels {

constexpr int POSITION_BIAS_PARAMETERS = 14;

struct PositionBias {
  const void* parameters[POSITION_BIAS_PARAMETERS];  // contiguous; Linear [p, 2], three times LayerNorm and Linear
  int64_t hidden, heads;                             // p; rows of the last Linear
  int64_t group_h, group_w;                          // tokens
  bool residual;

  int64_t offsets() const { return (2 * group_h - 1) * (2 * group_w - 1); }
};

// Offsets [begin, end), in the order of a head's table [2Gh-1, 2Gw-1]. `gradients`: the 14, flattened one after the other; written.
using PositionBiasForward = void (*)(const PositionBias&, int64_t begin, int64_t end, void* table);
using PositionBiasBackward = void (*)(const PositionBias&, int64_t begin, int64_t end, const void* dtable, void* gradients);

struct PositionBiasKernels {
  PositionBiasForward forward[2];  // float, double
  PositionBiasBackward backward[2];
};

namespace baseline {
PositionBiasKernels position_bias_kernels();
}
namespace avx2 {
PositionBiasKernels position_bias_kernels();
}
namespace avx512 {
PositionBiasKernels position_bias_kernels();
}

}  // namespace vitkernels
