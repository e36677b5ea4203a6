// What the operator hands to the kernel, and the settings of the launch. No CUDA here, and no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tree.h"

namespace vitkernels {

constexpr int LANES = 32;
constexpr int MAX_WARPS = 16;  // of a block: 128 registers for each lane
constexpr int CHUNK = 8;       // features that a lane loads together; their number is a multiple of it
constexpr int CHUNKS = 2;      // that a lane has of a token: more would spill
constexpr int MAX_FEATURES = LANES * CHUNKS * CHUNK;
constexpr int MAX_TOKENS = 1 << 15;  // an index and a flag share 16 bits

enum class Element { FLOAT, HALF, BFLOAT16 };

struct Problem {
  const void* x;  // [B, N, heads, features], every row on a multiple of 16 bytes
  int64_t stride_b, stride_n, stride_h;
  int32_t* out;           // [B, heads, N]
  uint32_t* workspace;    // [B * heads, words_of_order(N)], or null where these words are in shared memory
  int64_t blocks, heads;  // blocks: B * heads
  Tree tree;
  int features, iterations;
  float sharpness;  // log2(e) / temperature
};

// What a warp tells its team: the extremes of its keys, its tokens with the key of an edge, those of the left child.
// An edge stands between the `target` lowest tokens of a node and the others. Its key is in [low, low + range], with
// `before` tokens below low; in the end range is 0, and the first target - before tokens of key low are before it.
struct Edge {
  uint32_t low, range;
  int before, target;
};
struct alignas(16) Notes {
  uint32_t lowest, highest;
  int equal[3], left;
  Edge edges[3];  // in those of a team's first warp
};

// Words of a key and of an order's entry for every token.
VITKERNELS_INLINE int64_t words_of_order(int64_t tokens) { return tokens + (tokens + 1) / 2; }

// Words of a warp's scratch: sums and centroids, [2, 2, features]; later histograms, of 32 bins for each edge.
VITKERNELS_INLINE int words_of_scratch(int features) { return 4 * features > 3 * LANES ? 4 * features : 3 * LANES; }

// A block's shared memory: notes and scratch of its warps, then, where they fit, the order and the features.
VITKERNELS_INLINE size_t bytes_of_warps(int warps, int features) {
  return MAX_WARPS * sizeof(Notes) + warps * words_of_scratch(features) * sizeof(float);
}
VITKERNELS_INLINE size_t bytes_of_order(int64_t tokens) { return (words_of_order(tokens) * 4 + 15) / 16 * 16; }

struct Launch {
  int warps;
  bool resident;   // the features are in shared memory
  bool workspace;  // the order is not
  size_t shared;   // bytes
};

// One warp for 128 tokens, so that few blocks still fill a multiprocessor and many still have work between barriers;
// fewer where their sums would take half of the shared memory, of `limit` bytes. The features are read at every
// iteration of every level: they come into shared memory where it holds them, else from the cache.
inline Launch plan(int64_t tokens, int features, size_t feature_size, size_t limit) {
  Launch launch{1, false, false, 0};
  while (launch.warps < MAX_WARPS && launch.warps * 128 < tokens) launch.warps *= 2;
  while (launch.warps > 1 && bytes_of_warps(launch.warps, features) > limit / 2) launch.warps /= 2;
  launch.shared = bytes_of_warps(launch.warps, features);
  launch.workspace = launch.shared + bytes_of_order(tokens) > limit;
  if (launch.workspace) return launch;
  launch.shared += bytes_of_order(tokens);
  launch.resident = launch.shared + tokens * features * feature_size <= limit;
  if (launch.resident) launch.shared += tokens * features * feature_size;
  return launch;
}

// The softmax of s / temperature is that of s * sharpness with powers of 2.
inline float sharpness(double temperature) { return float(1.4426950408889634 / temperature); }

// What a block of the device may have; a launch on the device's stream (a cudaStream_t). They throw what CUDA refuses.
size_t shared_memory_of(int device);
void launch(const Problem& problem, Element element, const Launch& settings, int device, void* stream);

}  // namespace vitkernels
