// Balanced clustering of the tokens of one (image, head) by one block: every level and iteration in one launch.
//
// A node is kept in ascending order of its tokens' indices, and a flag of each token tells the two halves of the node
// apart, whose means the clustering starts from. So ties need no second key, and a level that is not the last needs
// of the sort only which quarter a token falls into: three edges, found by histograms of the ratios. The last level
// ranks every token. A team of warps works on one node and then parts with it; from as many nodes as warps on, each
// warp is a team of its own. Every sum has a fixed order.
#pragma once

#include "balanced_clusters.h"

namespace vitkernels {

constexpr unsigned ALL = 0xffffffff;
constexpr uint32_t SECOND = 1 << 15;  // of an order's entry: the token is in its node's second half
constexpr uint32_t RIGHT = 1 << 16;   // the token moves to its node's right child

// Places of one node, or of a warp's share of it.
struct Span {
  int first, last;
};

extern __shared__ uint4 shared_memory[];

// The warps that work on one node.
struct Team {
  int first, warps, rank;

  __device__ void sync() const {
    if (warps == 1)
      __syncwarp();
    else
      __barrier_sync_count(first, warps * LANES);
  }
  __device__ Span share(Span node) const {
    int size = node.last - node.first;
    return {node.first + size * rank / warps, node.first + size * (rank + 1) / warps};
  }
};

// CHUNK features as they lie in memory, and as floats.
template <class T>
struct Chunk {
  uint4 bits[CHUNK * sizeof(T) / sizeof(uint4)] = {};

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < int(CHUNK * sizeof(T) / sizeof(uint4)); i++) bits[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  // The i-th pair.
  __device__ float2 pair(int i) const;
  __device__ uint32_t word(int i) const {
    uint4 four = bits[i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  }
};
template <>
__device__ __forceinline__ float2 Chunk<float>::pair(int i) const {
  return {__uint_as_float(word(2 * i)), __uint_as_float(word(2 * i + 1))};
}
template <>
__device__ __forceinline__ float2 Chunk<__nv_bfloat16>::pair(int i) const {
  return {__uint_as_float(word(i) << 16), __uint_as_float(word(i) & 0xffff0000)};
}
template <>
__device__ __forceinline__ float2 Chunk<__half>::pair(int i) const {
  return {__half2float(__ushort_as_half(word(i) & 0xffff)), __half2float(__ushort_as_half(word(i) >> 16))};
}

// Unsigned integers in the order of the floats: -0 is +0, and every NaN is the same, above all, below 2^32 - 1.
__device__ __forceinline__ uint32_t key_of(float ratio) {
  uint32_t bits = __float_as_uint(ratio + 0.0f);
  if (ratio != ratio) return 0xfffffffe;
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float no_less(float x, float least) { return x < least ? least : x; }  // NaN stays NaN

// Adds the sums of lanes that hold the same features of other tokens. A lane keeps `count` of them, from `first` on.
template <int COUNT, int MASK, int N>
__device__ __forceinline__ void fold(float (&sums)[N], int lane, int slices, int& first, int& count) {
  count = COUNT;
  if constexpr (MASK > 0) {
    if (MASK < slices) return;
    bool upper = lane & MASK;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
      float given = __shfl_xor_sync(ALL, upper ? sums[i] : sums[i + COUNT / 2], MASK);
      sums[i] = (upper ? sums[i + COUNT / 2] : sums[i]) + given;
    }
    first += upper ? COUNT / 2 : 0;
    fold<COUNT / 2, MASK / 2>(sums, lane, slices, first, count);
  }
}

// One warp of the block. A token is a few neighbouring lanes, each with CHUNKS chunks of its features.
template <class T, bool RESIDENT>
struct Clustering {
  static constexpr int F = CHUNKS * CHUNK;

  const Problem& problem;
  const T* rows;    // features of token 0
  uint32_t* value;  // [N] by place: one over the norm, then the ratio's key, then the entry and its quarter
  uint16_t* order;  // [N] by place: token and SECOND
  int warp, lane;
  int shift;  // 2^shift lanes have a token

  __device__ int slices() const { return 1 << shift; }
  __device__ int slice() const { return lane & (slices() - 1); }

  __device__ Notes& notes(int of_warp) const { return reinterpret_cast<Notes*>(shared_memory)[of_warp]; }
  __device__ float* sums(int of_warp) const {
    return reinterpret_cast<float*>(&notes(MAX_WARPS)) + of_warp * words_of_scratch(problem.features);
  }
  // [2, features]: the first centroid minus the second, and the second.
  __device__ float* axis_of(Team team) const { return sums(team.first) + 2 * problem.features; }
  __device__ unsigned earlier_lanes() const { return (1u << lane) - 1; }

  // This lane's features of a row, zeros beyond the last.
  template <class S>
  __device__ void load(const S* row, float (&x)[F]) const {
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      int feature = (slice() + slices() * k) * CHUNK;
      Chunk<S> chunk;
      if (feature < problem.features) chunk.load(row + feature);
#pragma unroll
      for (int i = 0; i < CHUNK / 2; i++) {
        float2 two = chunk.pair(i);
        x[k * CHUNK + 2 * i] = two.x, x[k * CHUNK + 2 * i + 1] = two.y;
      }
    }
  }

  __device__ const T* row(int token) const {
    if (RESIDENT) return rows + token * problem.features;
    return rows + token * problem.stride_n;
  }

  __device__ float dot(const float (&a)[F], const float (&b)[F]) const {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < F; i++) sum[i % 4] += a[i] * b[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // The sum over a token's lanes.
  __device__ float total(float x) const {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) {
      if (mask >= slices()) break;
      x += __shfl_xor_sync(ALL, x, mask);
    }
    return x;
  }

  // Sums of the share's features: at first of the node's halves, then under the softmax of the similarities.
  __device__ void accumulate(Team team, Span share, bool initial) {
    float x[F], axis[F] = {}, sum[2 * F] = {};
    if (!initial) load(axis_of(team), axis);
    for (int base = share.first; base < share.last; base += LANES >> shift) {
      bool inside = base + (lane >> shift) < share.last;
      int place = inside ? base + (lane >> shift) : share.first;
      uint32_t entry = order[place];
      load(row(entry & ~SECOND), x);
      float first, second;  // weights
      if (initial) {
        float inverse = 1 / no_less(sqrtf(total(dot(x, x))), 1e-12f);
        if (inside && slice() == 0) value[place] = __float_as_uint(inverse);
        first = entry & SECOND ? 0 : 1, second = entry & SECOND ? 1 : 0;
      } else {
        float logit = total(dot(x, axis)) * __uint_as_float(value[place]) * problem.sharpness;
        float power = exp2f(-fabsf(logit)), larger = __fdividef(1, 1 + power), smaller = power * larger;
        first = logit > 0 ? larger : smaller, second = logit > 0 ? smaller : larger;
      }
      if (!inside) first = second = 0;
#pragma unroll
      for (int i = 0; i < F; i++) sum[i] += first * x[i], sum[F + i] += second * x[i];
    }
    int from = 0, count;
    fold<2 * F, LANES / 2>(sum, lane, slices(), from, count);
#pragma unroll
    for (int i = 0; i < 2 * F; i++) {
      if (i >= count) break;
      int centroid = (from + i) / F, k = (from + i) % F / CHUNK;
      int feature = (slice() + slices() * k) * CHUNK + (from + i) % CHUNK;
      if (feature < problem.features) sums(warp)[centroid * problem.features + feature] = sum[i];
    }
  }

  // The centroids: directions of the means a and b of n tokens, from the sums of the team's warps. Where an image is
  // flat they nearly coincide, and what tells its tokens apart is their difference: a / |a| - b / |b| is taken as
  // (a - b + b (1 - |a| / |b|)) / |a|, whose inner difference comes from (b - a) (b + a).
  __device__ void find_axis(Team team, int n) {
    team.sync();
    if (team.rank == 0) {
      float *axis = axis_of(team), *base = axis + problem.features;
      float aa = 0, bb = 0, gap = 0;
#pragma unroll 1
      for (int f = lane; f < problem.features; f += LANES) {
        float a = 0, b = 0;
#pragma unroll 1
        for (int w = team.first; w < team.first + team.warps; w++)
          a += sums(w)[f], b += sums(w)[problem.features + f];
        axis[f] = a /= n, base[f] = b /= n;
        aa += a * a, bb += b * b, gap += (b - a) * (b + a);
      }
      for (int mask = LANES / 2; mask; mask /= 2) {
        aa += __shfl_xor_sync(ALL, aa, mask), bb += __shfl_xor_sync(ALL, bb, mask);
        gap += __shfl_xor_sync(ALL, gap, mask);
      }
      float norm_a = no_less(sqrtf(aa), 1e-12f), norm_b = no_less(sqrtf(bb), 1e-12f);
      float rest = gap / (norm_a + norm_b) / norm_b;
#pragma unroll 1
      for (int f = lane; f < problem.features; f += LANES)
        axis[f] = (axis[f] - base[f] + base[f] * rest) / norm_a, base[f] /= norm_b;
    }
    team.sync();
  }

  // The keys of the share's ratios (s0 + 1) / (s1 + 1) - 1, whose small values do not drown in the rounding of 1, and
  // the extremes.
  __device__ void score(Team team, Span share) {
    float x[F], axis[F], second[F];
    load(axis_of(team), axis);
    load(axis_of(team) + problem.features, second);
    uint32_t lowest = ~0u, highest = 0;
    for (int base = share.first; base < share.last; base += LANES >> shift) {
      bool inside = base + (lane >> shift) < share.last;
      int place = inside ? base + (lane >> shift) : share.first;
      load(row(order[place] & ~SECOND), x);
      float above = total(dot(x, axis)), below = total(dot(x, second));
      if (!inside || slice() != 0) continue;  // one lane alone reads the norm and writes the key in its place
      float inverse = __uint_as_float(value[place]);
      uint32_t key = key_of(above * inverse / (below * inverse + 1));
      value[place] = key;
      lowest = min(lowest, key), highest = max(highest, key);
    }
    lowest = __reduce_min_sync(ALL, lowest), highest = __reduce_max_sync(ALL, highest);
    if (lane == 0) notes(warp).lowest = lowest, notes(warp).highest = highest;
    team.sync();
  }

  // An edge between the lowest and the highest key of the team's node.
  __device__ Edge widest(Team team, int target) const {
    uint32_t lowest = ~0u, highest = 0;
    for (int w = team.first; w < team.first + team.warps; w++)
      lowest = min(lowest, notes(w).lowest), highest = max(highest, notes(w).highest);
    return {lowest, highest - lowest, 0, target};
  }

  // Bins of 2^shift keys, so that `bins`, a power of two, cover the range.
  static __device__ int shift_of(uint32_t range, int bins) { return max(0, 1 + __clz(bins) - __clz(range)); }

  // The bin in which the target falls becomes the edge's range.
  __device__ Edge narrowed(Edge edge, const uint32_t* histogram, int bins) const {
    int shift = shift_of(edge.range, bins), before = edge.before;
    for (int base = 0; base < bins; base += LANES) {
      int count = histogram[base + lane], sum = count;
      for (int step = 1; step < LANES; step *= 2) {
        int earlier = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += earlier;
      }
      unsigned beyond = __ballot_sync(ALL, before + sum > edge.target);
      if (beyond) {
        int bin = __ffs(beyond) - 1;
        uint32_t skipped = uint32_t(base + bin) << shift;
        before += __shfl_sync(ALL, sum - count, bin);
        uint32_t range = before == edge.target ? 0 : min(edge.range - skipped, (1u << shift) - 1);
        return {edge.low + skipped, range, before, edge.target};
      }
      before += __shfl_sync(ALL, sum, LANES - 1);
    }
    return edge;
  }

  // Finds the three edges between a node's quarters.
  __device__ void find_edges(Team team, Span node, Span share, int level, int j) {
    Edge* edges = notes(team.first).edges;
    uint32_t* histogram = reinterpret_cast<uint32_t*>(sums(team.first));  // [3, bins]
    int bins = LANES * team.warps;
    for (int e = team.rank; e < 3; e += team.warps) {
      Edge edge = widest(team, problem.tree.first(level + 2, 4 * j + 1 + e) - node.first);
      if (lane == 0) edges[e] = edge;
    }
    do {
      for (int e = 0; e < 3; e++) histogram[e * bins + LANES * team.rank + lane] = 0;
      team.sync();
      const Edge now[3] = {edges[0], edges[1], edges[2]};
      for (int place = share.first + lane; place < share.last; place += LANES)
        for (int e = 0; e < 3; e++) {
          uint32_t offset = value[place] - now[e].low, range = now[e].range;
          if (offset <= range) atomicAdd(histogram + e * bins + (offset >> shift_of(range, bins)), 1u);
        }
      team.sync();
      for (int e = team.rank; e < 3; e += team.warps) {
        Edge edge = edges[e];
        if (edge.range) edge = narrowed(edge, histogram + e * bins, bins);
        __syncwarp();
        if (lane == 0) edges[e] = edge;
      }
      team.sync();
    } while (edges[0].range | edges[1].range | edges[2].range);
  }

  // Moves the tokens of a node to its children, each in ascending order of token indices, the halves flagged.
  __device__ void split(Team team, Span node, Span share, int middle) {
    const Edge* in_notes = notes(team.first).edges;
    const Edge edges[3] = {in_notes[0], in_notes[1], in_notes[2]};
    int equal[3] = {}, left = 0;
    for (int base = share.first; base < share.last; base += LANES)
      for (int e = 0; e < 3; e++) {
        bool inside = base + lane < share.last;
        equal[e] += __popc(__ballot_sync(ALL, inside && value[base + lane] == edges[e].low));
      }
    if (lane == 0)
      for (int e = 0; e < 3; e++) notes(warp).equal[e] = equal[e];
    team.sync();

    int allowed[3];  // tokens of the edge's key, from this share's first on, that are before the edge
    for (int e = 0; e < 3; e++) {
      allowed[e] = edges[e].target - edges[e].before;
      for (int w = team.first; w < warp; w++) allowed[e] -= notes(w).equal[e];
    }
    for (int base = share.first; base < share.last; base += LANES) {
      int place = base + lane, quarter = 0;
      bool inside = place < share.last;
      uint32_t key = inside ? value[place] : 0;
      for (int e = 0; e < 3; e++) {
        unsigned ties = __ballot_sync(ALL, inside && key == edges[e].low);
        bool after = key > edges[e].low || (key == edges[e].low && __popc(ties & earlier_lanes()) >= allowed[e]);
        allowed[e] -= __popc(ties);
        quarter += after;
      }
      if (inside) value[place] = (order[place] & ~SECOND) | (quarter & 1 ? SECOND : 0) | (quarter & 2 ? RIGHT : 0);
      left += __popc(__ballot_sync(ALL, inside && quarter < 2));
    }
    if (lane == 0) notes(warp).left = left;
    team.sync();

    int next_left = node.first;
    for (int w = team.first; w < warp; w++) next_left += notes(w).left;
    int next_right = middle + share.first - next_left;
    for (int base = share.first; base < share.last; base += LANES) {
      bool inside = base + lane < share.last;
      uint32_t entry = inside ? value[base + lane] : RIGHT;
      unsigned lefts = __ballot_sync(ALL, !(entry & RIGHT)), lefts_before = __popc(lefts & earlier_lanes());
      int place = entry & RIGHT ? next_right + lane - lefts_before : next_left + lefts_before;
      if (inside) order[place] = uint16_t(entry);
      next_left += __popc(lefts), next_right += LANES - __popc(lefts);
    }
    team.sync();
  }

  // Writes the tokens of a node in the order of their keys. Lanes rank RANKED tokens against all.
  __device__ void write_sorted(Team team, Span node) {
    constexpr int RANKED = 4;
    const uint32_t* keys = value + node.first;
    int32_t* out = problem.out + blockIdx.x * problem.tree.tokens;
    int size = node.last - node.first;
    for (int base = team.rank * RANKED * LANES; base < size; base += team.warps * RANKED * LANES) {
      uint32_t key[RANKED];
      int rank[RANKED];
#pragma unroll
      for (int k = 0; k < RANKED; k++) {
        int i = base + k * LANES + lane;
        key[k] = i < size ? keys[i] : ~0u;
        rank[k] = __popc(__match_any_sync(ALL, key[k]) & earlier_lanes());
      }
      for (int tile = 0; tile < size; tile += LANES) {
        uint32_t bound[RANKED];  // a tie is before where its tile is
#pragma unroll
        for (int k = 0; k < RANKED; k++) bound[k] = key[k] + (tile < base + k * LANES);
        for (int i = tile; i < min(tile + LANES, size); i++)
#pragma unroll
          for (int k = 0; k < RANKED; k++) rank[k] += keys[i] < bound[k];
      }
#pragma unroll
      for (int k = 0; k < RANKED; k++) {
        int i = base + k * LANES + lane;
        if (i < size) out[node.first + rank[k]] = order[node.first + i] & ~SECOND;
      }
    }
  }

  // Halves node j of a level, or sorts it if its halves are leaves.
  __device__ void halve(Team team, int level, int j) {
    const Tree& tree = problem.tree;
    Span node = {int(tree.first(level, j)), int(tree.first(level, j + 1))}, share = team.share(node);
    for (int i = 0; i <= problem.iterations; i++) {
      accumulate(team, share, i == 0);
      find_axis(team, node.last - node.first);
    }
    score(team, share);
    if (level + 1 == tree.levels) return write_sorted(team, node);
    find_edges(team, node, share, level, j);
    split(team, node, share, tree.first(level + 1, 2 * j + 1));
  }

  // All levels. The warps of a team share the nodes that its split leaves.
  __device__ void run(int warps) {
    for (int level = 0; level < problem.tree.levels; level++) {
      int teams = min(1 << level, warps), size = warps / teams, nodes = (1 << level) / teams;
      Team team = {warp / size * size, size, warp % size};
      for (int j = warp / size * nodes, end = j + nodes; j < end; j++) halve(team, level, j);
    }
  }
};

// One block per (image, head); its warps are a power of two.
template <class T, bool RESIDENT>
__global__ void __launch_bounds__(LANES* MAX_WARPS) balanced_clusters_kernel(Problem problem) {
  int tokens = problem.tree.tokens, thread = threadIdx.x, threads = blockDim.x, warps = threads / LANES;
  if (problem.tree.levels == 0) {
    for (int t = thread; t < tokens; t += threads) problem.out[blockIdx.x * problem.tree.tokens + t] = t;
    return;
  }
  int64_t b = blockIdx.x / problem.heads, h = blockIdx.x % problem.heads;
  const T* x = static_cast<const T*>(problem.x) + b * problem.stride_b + h * problem.stride_h;

  char* rest = reinterpret_cast<char*>(shared_memory) + bytes_of_warps(warps, problem.features);
  uint32_t* value = reinterpret_cast<uint32_t*>(rest);
  if (!RESIDENT && problem.workspace) value = problem.workspace + blockIdx.x * words_of_order(tokens);
  uint16_t* order = reinterpret_cast<uint16_t*>(value + tokens);

  const T* rows = x;
  if (RESIDENT) {
    uint4* resident = reinterpret_cast<uint4*>(rest + bytes_of_order(tokens));
    int words = problem.features * sizeof(T) / sizeof(uint4);  // of a row
    for (int i = thread; i < tokens * words; i += threads)
      resident[i] = reinterpret_cast<const uint4*>(x + i / words * problem.stride_n)[i % words];
    rows = reinterpret_cast<const T*>(resident);
  }
  for (int t = thread; t < tokens; t += threads) order[t] = t | (t < tokens / 2 ? 0 : SECOND);
  __syncthreads();

  int shift = 0;
  while (CHUNKS * CHUNK << shift < problem.features) shift++;
  Clustering<T, RESIDENT>{problem, rows, value, order, thread / LANES, thread % LANES, shift}.run(warps);
}

}  // namespace vitkernels
