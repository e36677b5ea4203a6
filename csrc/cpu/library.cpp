// What the library offers beside its operators, each of which registers itself in its own file.
#include <cstdlib>
#include <string>

#include "capability.h"

namespace vitkernels {
namespace {

Capability best() {
#if defined(VITKERNELS_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Capability::AVX512;
#endif
#if defined(VITKERNELS_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Capability::AVX2;
#endif
  return Capability::BASELINE;
}

Capability chosen() {
  const char* variable = std::getenv("VITKERNELS_CPU_CAPABILITY");
  std::string wanted = variable ? variable : "";
  Capability limit = wanted == "default" ? Capability::BASELINE
                     : wanted == "avx2"  ? Capability::AVX2
                                         : Capability::AVX512;
  return limit < best() ? limit : best();
}

}  // namespace

Capability capability() {
  static const Capability level = chosen();
  return level;
}

}  // namespace vitkernels

extern "C" __attribute__((visibility("default"))) const char* vitkernels_cpu_capability() {
  const char* names[] = {"default", "avx2", "avx512"};
  return names[int(vitkernels::capability())];
}

// Python finds the library by the name of an extension module; it has nothing to initialise.
extern "C" __attribute__((visibility("default"))) void* PyInit__C() { return nullptr; }
