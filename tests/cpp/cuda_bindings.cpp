// The kernels of csrc/cuda for tests/test_cuda.py, on the host. Compiled by the test, without torch and without CUDA.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_on_host.h"

// after the language that it is written in
#include "cuda/balanced_clusters.cuh"

namespace py = pybind11;
using namespace vitkernels;

constexpr size_t SHARED = 228 * 1024, GUARD = 1024;
alignas(16) uint4 vitkernels::shared_memory[(SHARED + GUARD) / sizeof(uint4)];

using Kernel = void (*)(Problem);

template <class T>
Kernel kernel_of(bool resident) {
  return resident ? balanced_clusters_kernel<T, true> : balanced_clusters_kernel<T, false>;
}

Kernel kernel_of(const std::string& dtype, bool resident) {
  if (dtype == "float32") return kernel_of<float>(resident);
  return dtype == "float16" ? kernel_of<__half>(resident) : kernel_of<__nv_bfloat16>(resident);
}

size_t size_of(const std::string& dtype) { return dtype == "float32" ? 4 : 2; }

// (warps, resident, workspace, bytes of shared memory) on a chip with `limit` bytes of it
std::tuple<int, bool, bool, size_t> plan_of(int64_t tokens, int features, const std::string& dtype, size_t limit) {
  Launch launch = plan(tokens, features, size_of(dtype), limit);
  return {launch.warps, launch.resident, launch.workspace, launch.shared};
}

// x: address of [B, N, heads, D] elements of dtype; the order [B, heads, N].
py::array_t<int32_t> balanced_clusters(uint64_t x, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides,
                                       const std::string& dtype, int64_t leaf_size, int iterations, double temperature,
                                       size_t limit, unsigned seed) {
  auto [batch, tokens, heads, features] = shape;
  Launch launch = plan(tokens, int(features), size_of(dtype), limit);
  py::array_t<int32_t> out({batch, heads, tokens});
  std::vector<uint32_t> workspace(launch.workspace ? batch * heads * words_of_order(tokens) : 0, 0xffffffff);
  Problem problem{};
  problem.x = reinterpret_cast<const void*>(x);
  problem.stride_b = strides[0], problem.stride_n = strides[1], problem.stride_h = strides[2];
  problem.out = out.mutable_data();
  problem.workspace = launch.workspace ? workspace.data() : nullptr;
  problem.blocks = batch * heads, problem.heads = heads;
  problem.tree = Tree::of(tokens, leaf_size);
  problem.features = int(features), problem.iterations = iterations;
  problem.sharpness = sharpness(temperature);
  Kernel kernel = kernel_of(dtype, launch.resident);
  for (int64_t block = 0; block < batch * heads; block++) {
    std::memset(shared_memory, 0xff, sizeof(shared_memory));  // NaN
    blockIdx = {unsigned(block), 0, 0};
    on_host::Block().run(launch.warps * LANES, seed, [&] { kernel(problem); });
    const char* end = reinterpret_cast<const char*>(shared_memory) + launch.shared;
    if (std::any_of(end, end + GUARD, [](char byte) { return byte != char(0xff); }))
      throw std::runtime_error("written beyond the shared memory");
  }
  return out;
}

PYBIND11_MODULE(cuda_bindings, m) {
  m.def("plan", &plan_of);
  m.def("balanced_clusters", &balanced_clusters);
}
