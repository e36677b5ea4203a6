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

// Unsigned bits that are ordered as the ratios are: NaN last, -0 like 0.
VITKERNELS_INLINE Vec<int32_t> sort_keys(Vec<float> ratios) {
  Vec<int32_t> bits = as_bits(ratios + 0.0f), none{};
  bits ^= bits >> 31 | INT32_MIN;
  return ratios == ratios ? bits : ~none;
}

// Tokens in their current order: rows of features, their norms, their indices.
struct Tokens {
  Matrix<float> rows;
  float* norms;
  int32_t* indices;

  VITKERNELS_INLINE Tokens from(int64_t place) const { return {rows.at(place, 0), norms + place, indices + place}; }
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
    if (p_.tree.levels)
      cluster(here_, there_, 0, 0, pivots_);
    else
      std::memcpy(order_, here_.indices, tokens_ * sizeof(int32_t));
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
      for (int64_t l = 0; l < least(L, tokens_ - i); l++) here_.norms[i + l] = std::fmax(std::sqrt(squares[l]), 1e-12f);
    }
  }

  // Sorts node `node` of `level`, which lies in `from`, into `to` and halves it; a leaf's parent into the order. Rows
  // are kept relative to a pivot, a token of the node, so that sums over tokens that are nearly the same lose nothing.
  void cluster(Tokens from, Tokens to, int64_t level, int64_t node, const double* pivot) {
    int64_t first = p_.tree.first(level, node), count = p_.tree.first(level, node + 1) - first;
    int64_t split = p_.tree.first(level + 1, 2 * node + 1) - first;
    find_centroids(from, count, split, pivot);
    sort(from, count);
    if (level + 1 == p_.tree.levels) {
      for (int64_t i = 0; i < count; i++) order_[first + i] = from.indices[entries_[i].place];
      return;
    }
    double *left = pivots_ + (2 * level + 1) * width_, *right = left + width_;
    move(from, to, 0, split, pivot, left);
    move(from, to, split, count, pivot, right);
    cluster(to, from, level + 1, 2 * node, left);
    cluster(to.from(split), from.from(split), level + 1, 2 * node + 1, right);
  }

  // Places [begin, end) of the sorted node, relative to the first of them.
  void move(const Tokens& from, const Tokens& to, int64_t begin, int64_t end, const double* pivot, double* new_pivot) {
    const float* step = from.rows.row(entries_[begin].place);
    for (int64_t d = 0; d < width_; d++) new_pivot[d] = pivot[d] + step[d];
    for (int64_t i = begin; i < end; i++) {
      int64_t place = entries_[i].place;
      to.indices[i] = from.indices[place];
      to.norms[i] = from.norms[place];
      for (int64_t d = 0; d < width_; d += L)
        store(to.rows.row(i) + d, load(from.rows.row(place) + d) - load(step + d));
    }
  }

  // The two centroids of a node, from the means of its first `split` tokens and of the others.
  void find_centroids(const Tokens& node, int64_t count, int64_t split, const double* pivot) {
    std::memset(sums_, 0, 2 * width_ * sizeof(double));
    for (int64_t i = 0; i < split; i += BLOCK) add_rows(node.rows.at(i, 0), least(BLOCK, split - i), sums_);
    for (int64_t i = split; i < count; i += BLOCK)
      add_rows(node.rows.at(i, 0), least(BLOCK, count - i), sums_ + width_);
    double totals[2] = {double(split), double(count - split)};
    find_axis(pivot, totals, count);
    for (int64_t iteration = 0; iteration < p_.iterations; iteration++) {
      std::memset(sums_, 0, 2 * width_ * sizeof(double));
      totals[0] = totals[1] = 0;
      for (int64_t i = 0; i < count; i += BLOCK) {
        int64_t block = least(BLOCK, count - i);
        weigh(node.from(i), block);
        multiply<float>(weights_, node.rows.at(i, 0), partial_, 2, block, width_);
        for (int64_t j = 0; j < 2 * width_; j++) sums_[j] += partial_.data[j];
        for (int64_t c = 0; c < 2; c++) totals[c] += total_weight(weights_.row(c), block);
      }
      find_axis(pivot, totals, count);
    }
  }

  // The softmax of two similarities is a sigmoid of their difference; neither weight is 1 minus the other.
  void weigh(const Tokens& tokens, int64_t block) {
    for (int64_t i = 0; i < block; i += L) {
      Vec<float> logit = (similarities(tokens.rows.at(i, 0), axis_) + pivot_axis_) / load(tokens.norms + i);
      logit /= p_.temperature;
      Vec<float> small = exp<float>(logit > 0 ? -logit : logit), large = 1 / (1 + small);
      small *= large;
      store(weights_.row(0) + i, logit > 0 ? large : small);
      store(weights_.row(1) + i, logit > 0 ? small : large);
    }
  }

  static float total_weight(float* weights, int64_t block) {
    Vec<float> sum{};
    for (int64_t l = block; l < padded<float>(block); l++) weights[l] = 0;
    for (int64_t l = 0; l < block; l += L) sum += load(weights + l);
    return sum_of<float>(sum)[0];
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

  // The centroids are the directions of the weighted sums, whose weights have these totals, over a node of `count`
  // tokens: their difference, and the second. Where an image is flat they nearly coincide, and what tells its tokens
  // apart is the difference: double.
  void find_axis(const double* pivot, const double* totals, int64_t count) {
    double norms[2];
    for (int64_t c = 0; c < 2; c++) {
      double *sum = sums_ + c * width_, square = 0;
      for (int64_t d = 0; d < width_; d++) sum[d] += totals[c] * pivot[d], square += sum[d] * sum[d];
      norms[c] = std::fmax(std::sqrt(square), 1e-12 * count);  // of the mean at least 1e-12
    }
    double pivot_axis = 0, pivot_base = 0;
    for (int64_t d = 0; d < width_; d++) {
      double base = sums_[width_ + d] / norms[1], axis = sums_[d] / norms[0] - base;
      axis_[d] = axis, base_[d] = base;
      pivot_axis += pivot[d] * axis, pivot_base += pivot[d] * base;
    }
    pivot_axis_ = pivot_axis, pivot_base_ = pivot_base;
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
      // (s0 + 1) / (s1 + 1) - 1, whose small values do not drown in the rounding of 1
      Vec<float> ratios = (similarities(node.rows.at(i, 0), axis_) + pivot_axis_) / norms;
      ratios /= (similarities(node.rows.at(i, 0), base_) + pivot_base_) / norms + 1;
      Vec<int32_t> keys = sort_keys(ratios);
      for (int64_t l = 0; l < block; l++) entries_[i + l] = {uint32_t(keys[l]), uint32_t(i + l)};
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
    axis_ = memory_.take<float>(width_), base_ = memory_.take<float>(width_);
    pivots_ = memory_.take<double>((2 * p_.tree.levels + 1) * width_);
  }

  const BalancedClusters& p_;
  int64_t width_, tokens_;  // features, padded; N
  Workspace memory_;        // above all, the padding of rows is zero
  Tokens here_{}, there_{};
  Entry *entries_, *other_;
  Matrix<float> weights_, partial_;  // [2, tokens of a block], [2, width_]
  double* sums_;                     // [2, width_]
  float *axis_, *base_;              // the first centroid minus the second; the second
  float pivot_axis_, pivot_base_;    // their products with the pivot of the node
  double* pivots_;                   // of the root, 0, and of the current pair of nodes of every level
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
