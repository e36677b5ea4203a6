// Balanced clustering of one head of one image at a time: from the root on, a node is sorted and halved, its rows moved
// along, so that a node lies in one piece and its children in the nearest cache. Compiled once per vector level.
#include "balanced_clusters.h"

#include <cmath>
#include <utility>

#include "workspace.h"

namespace vitkernels::VITKERNELS_LEVEL {
namespace {

constexpr int L = LANES<float>;
constexpr int64_t BLOCK = 64;  // tokens whose sums are kept in float; sums of blocks are in double

// Bits that are ordered as the ratios are: NaN last, -0 like 0.
VITKERNELS_INLINE uint32_t sort_key(float ratio) {
  if (ratio != ratio) return 0xffffffff;
  ratio += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &ratio, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Tokens in their current order: rows of features, their norms, their indices.
struct Tokens {
  Matrix<float> rows;
  float* norms;
  int32_t* indices;

  VITKERNELS_INLINE Tokens from(int64_t place) const {
    return {rows.at(place, 0), norms + place, indices + place};
  }
};

struct Entry {
  uint32_t key, place;
};

template <class S>
class Worker {
 public:
  explicit Worker(const BalancedClusters& problem)
      : p_(problem), width_(padded<float>(problem.features)), tokens_(problem.tree.tokens) {
    memory_.allocate([&] { lay_out(); });
  }

  void run(int64_t task) {
    read(task / p_.heads, task % p_.heads);
    order_ = p_.order + task * tokens_;
    cluster(here_, there_, 0, 0);
  }

 private:
  void read(int64_t image, int64_t head) {
    const S* row = (const S*)p_.x.data + (image * p_.x.batch + head * p_.x.head);
    for (int64_t i = 0; i < tokens_; i++, row += p_.x.x) {
      copy_row(here_.rows.row(i), row, p_.features, 1.0f);
      here_.indices[i] = i;
    }
    for (int64_t i = 0; i < tokens_; i += L) {
      Vec<float> squares = similarities(here_.rows.at(i, 0), nullptr);
      for (int64_t l = 0; l < least(L, tokens_ - i); l++)
        here_.norms[i + l] = std::fmax(std::sqrt(squares[l]), 1e-12f);
    }
  }

  // Node `node` of `level` lies in `from`; its sorted tokens go to `to`, or where it is a leaf's parent to the order.
  void cluster(Tokens from, Tokens to, int64_t level, int64_t node) {
    int64_t first = p_.tree.first(level, node), count = p_.tree.first(level, node + 1) - first;
    if (level == p_.tree.levels) {
      std::memcpy(order_ + first, from.indices, count * sizeof(int32_t));
      return;
    }
    int64_t split = p_.tree.first(level + 1, 2 * node + 1) - first;
    find_centroids(from, count, split);
    sort(from, count);
    bool last = level + 1 == p_.tree.levels;
    for (int64_t i = 0; i < count; i++) {
      int64_t place = entries_[i].place;
      to.indices[i] = from.indices[place];
      if (last) continue;
      to.norms[i] = from.norms[place];
      for (int64_t d = 0; d < width_; d += L) store(to.rows.row(i) + d, load(from.rows.row(place) + d));
    }
    cluster(to, from, level + 1, 2 * node);
    cluster(to.from(split), from.from(split), level + 1, 2 * node + 1);
  }

  // The two centroids of a node, from the means of its first `split` tokens and of the others.
  void find_centroids(const Tokens& node, int64_t count, int64_t split) {
    std::memset(sums_, 0, 2 * width_ * sizeof(double));
    for (int64_t i = 0; i < split; i += BLOCK) add_rows(node.rows.at(i, 0), least(BLOCK, split - i), sums_);
    for (int64_t i = split; i < count; i += BLOCK) add_rows(node.rows.at(i, 0), least(BLOCK, count - i), sums_ + width_);
    normalize(count);
    for (int64_t iteration = 0; iteration < p_.iterations; iteration++) {
      for (int64_t d = 0; d < width_; d += L)
        store(difference_ + d, load(centroids_[0] + d) - load(centroids_[1] + d));
      std::memset(sums_, 0, 2 * width_ * sizeof(double));
      for (int64_t i = 0; i < count; i += BLOCK) {
        int64_t block = least(BLOCK, count - i);
        weigh(node.from(i), block);
        multiply<float>(weights_, node.rows.at(i, 0), partial_, 2, block, width_);
        for (int64_t j = 0; j < 2 * width_; j++) sums_[j] += partial_.data[j];
      }
      normalize(count);
    }
  }

  // The softmax of two similarities is a sigmoid of their difference; neither weight is 1 minus the other.
  void weigh(const Tokens& tokens, int64_t block) {
    for (int64_t i = 0; i < block; i += L) {
      Vec<float> cosine = similarities(tokens.rows.at(i, 0), difference_) / load(tokens.norms + i);
      Vec<float> difference = cosine / p_.temperature;
      Vec<float> small = exp<float>(difference > 0 ? -difference : difference), large = 1 / (1 + small);
      small *= large;
      store(weights_.row(0) + i, difference > 0 ? large : small);
      store(weights_.row(1) + i, difference > 0 ? small : large);
    }
  }

  void add_rows(Matrix<float> rows, int64_t count, double* to) const {
    int64_t d = 0;
    for (; d + 4 * L <= width_; d += 4 * L) add_columns<4>(rows.at(0, d), count, to + d);
    for (; d < width_; d += L) add_columns<1>(rows.at(0, d), count, to + d);
  }

  template <int VECTORS>
  static void add_columns(Matrix<float> rows, int64_t count, double* to) {
    Vec<float> sum[VECTORS] = {};
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) sum[j] += load(rows.row(i) + j * L);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++)
      for (int l = 0; l < L; l++) to[j * L + l] += sum[j][l];
  }

  // The centroids become the directions of the sums over a node of `count` tokens.
  void normalize(int64_t count) {
    for (int64_t c = 0; c < 2; c++) {
      const double* sum = sums_ + c * width_;
      double square = 0;
      for (int64_t d = 0; d < width_; d++) square += sum[d] * sum[d];
      double norm = std::fmax(std::sqrt(square), 1e-12 * count);  // of the mean at least 1e-12
      for (int64_t d = 0; d < width_; d++) centroids_[c][d] = sum[d] / norm;
    }
  }

  // Of L rows with a direction, or with themselves. (There may be fewer: then the last lanes mean nothing.)
  VITKERNELS_INLINE Vec<float> similarities(Matrix<float> rows, const float* direction) const {
    Vec<float> products[L] = {};
    for (int64_t d = 0; d < width_; d += L) {
      Vec<float> other = direction ? load(direction + d) : Vec<float>{};
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) {
        Vec<float> row = load(rows.row(l) + d);
        products[l] += row * (direction ? other : row);
      }
    }
    return sums_of<float>(products);
  }

  // entries_: the places of a node's tokens, by ascending ratio of their similarities, then by index.
  void sort(const Tokens& node, int64_t count) {
    for (int64_t i = 0; i < count; i += L) {
      int64_t block = least(L, count - i);
      Vec<float> norms = load(node.norms + i);
      Vec<float> near = similarities(node.rows.at(i, 0), centroids_[0]) / norms + 1;
      Vec<float> ratios = near / (similarities(node.rows.at(i, 0), centroids_[1]) / norms + 1);
      for (int64_t l = 0; l < block; l++) entries_[i + l] = {sort_key(ratios[l]), uint32_t(i + l)};
    }
    sort_by_key(count);
    for (int64_t i = 1; i < count; i++) {  // ties, few or in order already: by insertion
      Entry entry = entries_[i];
      int64_t j = i;
      for (;
           j > 0 && entries_[j - 1].key == entry.key && node.indices[entries_[j - 1].place] > node.indices[entry.place];
           j--)
        entries_[j] = entries_[j - 1];
      entries_[j] = entry;
    }
  }

  // A radix sort of four bytes, which keeps the order of ties.
  void sort_by_key(int64_t count) {
    uint32_t counts[4][256] = {};
    for (int64_t i = 0; i < count; i++)
      for (int byte = 0; byte < 4; byte++) counts[byte][entries_[i].key >> 8 * byte & 255]++;
    for (int byte = 0; byte < 4; byte++) {
      uint32_t sum = 0;
      for (uint32_t& bucket : counts[byte]) sum += std::exchange(bucket, sum);
      for (int64_t i = 0; i < count; i++) other_[counts[byte][entries_[i].key >> 8 * byte & 255]++] = entries_[i];
      std::swap(entries_, other_);
    }
  }

  void lay_out() {
    for (Tokens* tokens : {&here_, &there_}) {
      tokens->rows = memory_.take<float>(tokens_ + L, width_);
      tokens->norms = memory_.take<float>(tokens_ + L);
      tokens->indices = memory_.take<int32_t>(tokens_);
    }
    entries_ = memory_.take<Entry>(tokens_), other_ = memory_.take<Entry>(tokens_);
    weights_ = memory_.take<float>(2, BLOCK);
    partial_ = memory_.take<float>(2, width_);
    sums_ = memory_.take<double>(2 * width_);
    for (float*& vector : centroids_) vector = memory_.take<float>(width_);
    difference_ = memory_.take<float>(width_);
  }

  const BalancedClusters& p_;
  int64_t width_, tokens_;  // features, padded; N
  Workspace memory_;        // above all, the padding of rows is zero
  Tokens here_{}, there_{};
  Entry *entries_, *other_;
  Matrix<float> weights_, partial_;  // [2, tokens of a block], [2, width_]
  double* sums_;                     // [2, width_]
  float *centroids_[2], *difference_;
  int32_t* order_ = nullptr;
};

template <class S>
void run(const BalancedClusters& problem, int64_t begin, int64_t end) {
  Worker<S> worker(problem);
  for (int64_t task = begin; task < end; task++) worker.run(task);
}

}  // namespace

BalancedClustersKernels balanced_clusters_kernels() { return {{run<float>, nullptr, run<Half>, run<BFloat16>}}; }

}  // namespace vitkernels::VITKERNELS_LEVEL
