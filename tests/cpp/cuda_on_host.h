// CUDA's threads on a host: what csrc/cuda/*.cuh use of the language, so that a C++ compiler builds the same source.
// The threads of a block are fibers of one thread. Each runs until it must wait; the order in which they run between
// two waits is drawn from a seed, so that a result which depends on it is a race.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline uint3 threadIdx, blockIdx, blockDim;

namespace on_host {

constexpr size_t STACK = 64 * 1024;

// Opens when all have arrived, and is then ready for the next time.
struct Barrier {
  int arrived = 0;
  unsigned opened = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  const Barrier* barrier = nullptr;  // it waits at
  unsigned opened = 0;               // of the barrier when it arrived
  unsigned exchanges = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];  // of exchanges, by turns
};

// One block. `seed` 0 runs the threads in ascending order.
class Block {
 public:
  static inline Block* current;

  void run(int threads, unsigned seed, const std::function<void()>& kernel) {
    current = this, kernel_ = &kernel;
    fibers_ = std::vector<Fiber>(threads), warps_ = std::vector<Warp>(threads / 32);
    blockDim = {unsigned(threads), 1, 1};
    std::vector<int> order(threads);
    for (int i = 0; i < threads; i++) order[i] = i, start(fibers_[i]);
    std::mt19937 random(seed);
    for (int left = threads; left > 0;) {
      if (seed) std::shuffle(order.begin(), order.end(), random);
      bool moved = false;
      for (int i : order) {
        Fiber& fiber = fibers_[i];
        if (fiber.done || (fiber.barrier && fiber.barrier->opened == fiber.opened)) continue;
        threadIdx = {unsigned(i), 0, 0};
        fiber.barrier = nullptr, moved = true;
        swapcontext(&scheduler_, &fiber.context);
        left -= fiber.done;
      }
      if (!moved) throw std::runtime_error("the threads wait for each other");
    }
  }

  void wait(Barrier& barrier, int threads) {
    Fiber& fiber = fibers_[threadIdx.x];
    if (++barrier.arrived == threads) {
      barrier.arrived = 0, barrier.opened++;
      return;
    }
    fiber.barrier = &barrier, fiber.opened = barrier.opened;
    swapcontext(&fiber.context, &scheduler_);
  }
  void wait_named(unsigned id, int threads) { wait(named_[id], threads); }
  Warp& warp() { return warps_[threadIdx.x / 32]; }

  // What every lane of the warp gives.
  template <class T>
  const uint64_t* exchange(T value) {
    uint64_t* slots = warp().slots[fibers_[threadIdx.x].exchanges++ % 2];
    slots[threadIdx.x % 32] = 0;
    std::memcpy(&slots[threadIdx.x % 32], &value, sizeof(value));
    wait(warp().barrier, 32);
    return slots;
  }

 private:
  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, [] { (*current->kernel_)(), current->fibers_[threadIdx.x].done = true; }, 0);
  }

  const std::function<void()>* kernel_;
  ucontext_t scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier named_[16];
};

template <class T>
T lane_of(const uint64_t* slots, int lane) {
  T value;
  std::memcpy(&value, &slots[lane], sizeof(T));
  return value;
}

inline int lane() { return threadIdx.x % 32; }

}  // namespace on_host

inline void __syncwarp() { on_host::Block::current->wait(on_host::Block::current->warp().barrier, 32); }
inline void __barrier_sync_count(unsigned id, unsigned threads) { on_host::Block::current->wait_named(id, threads); }
inline void __syncthreads() { __barrier_sync_count(0, blockDim.x); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::lane_of<T>(on_host::Block::current->exchange(value), lane % 32);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::lane_of<T>(on_host::Block::current->exchange(value), on_host::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  int lane = on_host::lane();
  return on_host::lane_of<T>(on_host::Block::current->exchange(value), lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t* slots = on_host::Block::current->exchange(value);
  unsigned ballot = 0;
  for (int i = 0; i < 32; i++) ballot |= unsigned(slots[i] != 0) << i;
  return ballot;
}
inline unsigned __match_any_sync(unsigned, uint32_t value) {
  const uint64_t* slots = on_host::Block::current->exchange(value);
  unsigned same = 0;
  for (int i = 0; i < 32; i++) same |= unsigned(slots[i] == value) << i;
  return same;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  const uint64_t* slots = on_host::Block::current->exchange(value);
  return uint32_t(*std::min_element(slots, slots + 32));
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  const uint64_t* slots = on_host::Block::current->exchange(value);
  return uint32_t(*std::max_element(slots, slots + 32));
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  uint32_t old = *address;
  *address += value;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __half2float(__half x) {
  int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                              : std::ldexp(float(mantissa + (exponent ? 1024 : 0)), std::max(exponent, 1) - 25);
  return x.bits >> 15 ? -size : size;
}
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

using std::max;
using std::min;
