// Cluster attention, a pair of sibling leaves at a time: gather their rows by the order, attend in each leaf, scatter.
// Compiled once per vector level.
#include "cluster_attention.h"

#include <initializer_list>
#include <utility>

#include "attention.h"
#include "workspace.h"

namespace vitkernels::VITKERNELS_LEVEL {
namespace {

// The places of a pair in one image, and a head; `split` of them are the first leaf's, all where it has no sibling.
struct Pair {
  int64_t image, head, places, split;  // places 0: nowhere
  int64_t* tokens;                     // at each place
};

template <class S>
VITKERNELS_INLINE S* row_of(const View& view, const Pair& pair, int64_t place) {
  return (S*)view.data + (pair.image * view.batch + pair.head * view.head + pair.tokens[place] * view.x);
}

// Brings the rows of a pair near, a few at every call (see partition_attention.kernel.cpp).
template <class S>
class Fetch {
 public:
  VITKERNELS_INLINE Fetch(const Pair& pair, int64_t row_bytes, std::initializer_list<const View*> views)
      : pair_(pair), row_bytes_(row_bytes) {
    if (pair.places == 0) return;
    for (const View* view : views) views_[count_++] = view;
  }

  VITKERNELS_INLINE void operator()() {
    for (int64_t bytes = 0; view_ < count_ && bytes < BYTES; bytes += row_bytes_) {
      const char* row = (const char*)row_of<S>(*views_[view_], pair_, place_);
      for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++place_ == pair_.places) place_ = 0, view_++;
    }
  }

 private:
  static constexpr int64_t BYTES = 16 * 64;  // of a call

  const Pair& pair_;
  const int64_t row_bytes_;
  int64_t count_ = 0, view_ = 0, place_ = 0;
  const View* views_[7];
};

template <class S, class T = Accumulation<S>>
class Worker {
 public:
  Worker(const ClusterAttention& problem, bool backward) : p_(problem), width_(padded<T>(problem.head_dim)) {
    memory_.allocate([&] { lay_out(backward); });
  }

  template <bool BACKWARD>
  void run(int64_t begin, int64_t end) {
    locate(next_, begin);
    for (int64_t task = begin; task < end; task++) {
      std::swap(here_, next_);
      next_.places = 0;
      if (task + 1 < end) locate(next_, task + 1);
      BACKWARD ? backward() : forward();
    }
  }

 private:
  void forward() {
    Fetch<S> fetch(next_, p_.head_dim * sizeof(S), {&p_.q, &p_.k, &p_.v, &p_.out});
    gather_qkv();
    for_leaves([&](const Buffers<T>& b, int64_t queries, int64_t keys) {
      attend<T>(b, queries, keys, width_, weigh_by(b, fetch), fetch);
    });
    scatter(p_.out, b_.out, 1);
  }

  void backward() {
    Fetch<S> fetch(next_, p_.head_dim * sizeof(S), {&p_.q, &p_.k, &p_.v, &p_.dout, &p_.dq, &p_.dk, &p_.dv});
    gather_qkv();
    gather(b_.dout, p_.dout, 1);
    transpose_into<T>(b_.v_transposed, b_.v, here_.places, width_);
    for (auto rows : {b_.dk, b_.dv}) std::memset(rows.data, 0, here_.places * width_ * sizeof(T));
    for_leaves([&](const Buffers<T>& b, int64_t queries, int64_t keys) {
      auto use = [](int64_t, int64_t) {};
      attend_backward<T>(b, queries, keys, p_.head_dim, width_, block_, true, weigh_by(b, fetch), use, fetch);
    });
    scatter(p_.dq, b_.out, T(p_.scale));
    scatter(p_.dk, b_.dk, 1);
    scatter(p_.dv, b_.dv, 1);
  }

  // visit(buffers, queries, keys) for each leaf: its keys are a run of the pair's.
  template <class Visit>
  void for_leaves(Visit visit) {
    bool sibling = here_.split < here_.places;
    int64_t reach = sibling ? here_.split + p_.overlap : here_.places;
    visit(from(0, 0, reach), here_.split, reach);
    if (!sibling) return;
    int64_t first = here_.split - p_.overlap;
    visit(from(here_.split, first, here_.places - first), here_.places - here_.split, here_.places - first);
  }

  // Buffers from a query and a key on; starts_ hides what lies behind the keys.
  Buffers<T> from(int64_t query, int64_t key, int64_t keys) {
    Buffers<T> b = b_.from(query, key);
    b.scores.stride = b.dscores.stride = padded<T>(keys);
    for (int64_t j = 0; j < b.scores.stride; j++) starts_[j] = j < keys ? T(0) : T(-__builtin_inf());
    return b;
  }

  // What writes rows of softmax(scale q k^T).
  auto weigh_by(const Buffers<T>& b, Fetch<S>& fetch) {
    return [&, this](int64_t begin, int64_t rows, Matrix<T> scores) {
      Matrix<T> start{starts_, 0};
      multiply<T>(b.q.at(begin, 0), b.k_transposed, scores, rows, p_.head_dim, scores.stride, start, fetch);
      softmax<T>(scores, rows, scores.stride, fetch);
    };
  }

  void lay_out(bool backward) {
    const Tree& tree = p_.tree;
    int64_t leaf = (tree.tokens + tree.leaves() - 1) >> tree.levels;  // the largest
    int64_t tokens = tree.levels ? 2 * leaf : leaf, keys = padded<T>(tree.levels ? leaf + p_.overlap : leaf);
    // transposed, a leaf's keys begin anywhere, and are read in full vectors
    int64_t rows = padded<T>(tokens), columns = rows + LANES<T>;
    block_ = backward ? least(leaf, SCORES / keys + STEP) : least(leaf, STEP);
    for (auto* matrix : {&b_.q, &b_.k, &b_.v, &b_.out}) *matrix = take(rows, width_);
    b_.k_transposed = take(width_, columns);
    b_.scores = take(block_, keys);
    starts_ = memory_.take<T>(keys);
    for (auto* pair : {&here_, &next_}) pair->tokens = memory_.take<int64_t>(rows);
    if (!backward) return;
    for (auto* matrix : {&b_.dout, &b_.dk, &b_.dv}) *matrix = take(rows, width_);
    b_.v_transposed = take(width_, columns);
    b_.dscores = take(block_, keys);
  }

  Matrix<T> take(int64_t rows, int64_t stride) { return memory_.take<T>(rows, stride); }

  void locate(Pair& pair, int64_t task) const {
    const Tree& tree = p_.tree;
    int64_t node = task % p_.pairs(), first = 0, last = tree.tokens;
    pair.head = task / p_.pairs() % p_.heads, pair.image = task / p_.pairs() / p_.heads;
    if (tree.levels) first = tree.first(tree.levels, 2 * node), last = tree.first(tree.levels, 2 * node + 2);
    pair.places = last - first;
    pair.split = tree.levels ? tree.first(tree.levels, 2 * node + 1) - first : last;
    const int32_t* order = p_.order_of(pair.image, pair.head) + first;
    for (int64_t i = 0; i < pair.places; i++)  // an order that nobody checked stays inside the tensors
      pair.tokens[i] = order[i] < 0 ? 0 : least(order[i], tree.tokens - 1);
  }

  void gather(Matrix<T> to, const View& from, T factor) {
    for (int64_t i = 0; i < here_.places; i++) copy_row(to.row(i), row_of<S>(from, here_, i), p_.head_dim, factor);
  }

  void scatter(const View& to, Matrix<T> from, T factor) {
    for (int64_t i = 0; i < here_.places; i++) copy_row(row_of<S>(to, here_, i), from.row(i), p_.head_dim, factor);
  }

  void gather_qkv() {
    gather(b_.q, p_.q, T(p_.scale));
    gather(b_.k, p_.k, 1);
    gather(b_.v, p_.v, 1);
    int64_t rows = padded<T>(here_.places);
    for (auto matrix : {b_.k, b_.v})  // a larger pair may have been here before
      std::memset(matrix.row(here_.places), 0, (rows - here_.places) * width_ * sizeof(T));
    transpose_into<T>(b_.k_transposed, b_.k, here_.places, width_);
  }

  const ClusterAttention& p_;
  int64_t width_, block_ = 0;  // head_dim, padded; rows of scores held
  Workspace memory_;           // above all, the padding of head_dim is zero
  Pair here_{}, next_{};
  Buffers<T> b_{};
  T* starts_ = nullptr;
};

template <class S, bool BACKWARD>
void run(const ClusterAttention& problem, int64_t begin, int64_t end) {
  Worker<S>(problem, BACKWARD).template run<BACKWARD>(begin, end);
}

}  // namespace

ClusterAttentionKernels cluster_attention_kernels() {
  return {
      {run<float, false>, run<double, false>, run<Half, false>, run<BFloat16, false>},
      {run<float, true>, run<double, true>, run<Half, true>, run<BFloat16, true>},
  };
}

}  // namespace vitkernels::VITKERNELS_LEVEL
