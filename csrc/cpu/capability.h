// The vector level in use: the best of those compiled that the processor has, or a lower one named by
// VITKERNELS_CPU_CAPABILITY.
#pragma once

namespace vitkernels {

enum class Capability { BASELINE, AVX2, AVX512 };

Capability capability();

}  // namespace vitkernels
