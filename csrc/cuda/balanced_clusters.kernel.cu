// The kernel for every kind of features, and its launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "balanced_clusters.cuh"

namespace vitkernels {
namespace {

using Kernel = void (*)(Problem);

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class T>
Kernel kernel_of(bool resident) {
  return resident ? balanced_clusters_kernel<T, true> : balanced_clusters_kernel<T, false>;
}

Kernel kernel_of(Element element, bool resident) {
  switch (element) {
    case Element::FLOAT: return kernel_of<float>(resident);
    case Element::HALF: return kernel_of<__half>(resident);
    default: return kernel_of<__nv_bfloat16>(resident);
  }
}

}  // namespace

size_t shared_memory_of(int device) {
  int bytes;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "balanced_clusters: asking for the device's shared memory");
  return bytes;
}

void launch(const Problem& problem, Element element, const Launch& settings, int device, void* stream) {
  check(cudaSetDevice(device), "balanced_clusters: choosing the device");
  Kernel kernel = kernel_of(element, settings.resident);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(settings.shared)),
        "balanced_clusters: asking for shared memory");
  kernel<<<unsigned(problem.blocks), settings.warps * LANES, settings.shared, static_cast<cudaStream_t>(stream)>>>(
      problem);
  check(cudaGetLastError(), "balanced_clusters: launch");
}

}  // namespace vitkernels
