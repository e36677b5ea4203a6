// Partition attention over shares of the work: gather the rows of a group, attend, scatter. Compiled once per vector
// level.
#include "partition_attention.h"

#include <initializer_list>
#include <utility>

#include "attention.h"
#include "workspace.h"

namespace vitkernels::VITKERNELS_LEVEL {
namespace {

// Up to this many pairs of tokens in a full group, the bias is spread out over them, and its gradient summed so, once
// per share.
constexpr int64_t SPREAD = 64 * 1024;

// The tokens of one group in one image, and a head.
struct Site {
  int64_t image, head, height, width;  // height 0: nowhere
  int64_t *ys, *xs;

  VITKERNELS_INLINE int64_t tokens() const { return height * width; }
};

// The first token's row in line y of the site; the others are xs[] away.
template <class S>
VITKERNELS_INLINE S* line_of(const View& view, const Site& site, int64_t y) {
  return (S*)view.data + (site.image * view.batch + site.head * view.head + site.ys[y] * view.y);
}

// Brings the rows of a site near, a few at every call: a processor has room for a dozen or so misses, and stands still
// when they come faster than memory answers. (GCC takes a function that only prefetches for one without effect, and
// drops its calls unless it is inlined.)
template <class S>
class Fetch {
 public:
  // All rows of the site in `reads`, to be read, then in `writes`, to be written.
  VITKERNELS_INLINE Fetch(const Site& site, int64_t row_bytes, std::initializer_list<const View*> reads,
                          std::initializer_list<const View*> writes)
      : site_(site), row_bytes_(row_bytes), reads_(reads.size()) {
    if (site.tokens() == 0) return;
    for (const View* view : reads) views_[count_++] = view;
    for (const View* view : writes) views_[count_++] = view;
    line_ = line_of<S>(*views_[0], site_, 0);
  }

  VITKERNELS_INLINE void operator()() {
    for (int64_t bytes = 0; view_ < count_ && bytes < BYTES; bytes += row_bytes_) {
      const char* row = (const char*)(line_ + site_.xs[x_] * views_[view_]->x);
      if (view_ < reads_)
        for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      else
        for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 1, 2);
      if (++x_ < site_.width) continue;
      x_ = 0;
      if (++y_ == site_.height) y_ = 0, view_++;
      if (view_ < count_) line_ = line_of<S>(*views_[view_], site_, y_);
    }
  }

 private:
  static constexpr int64_t BYTES = 16 * 64;  // of a call

  const Site& site_;
  const int64_t row_bytes_, reads_;
  int64_t count_ = 0, view_ = 0, y_ = 0, x_ = 0;
  const S* line_ = nullptr;
  const View* views_[7];
};

template <class S, class T = Accumulation<S>>
class Worker {
 public:
  Worker(const PartitionAttention& problem, bool backward)
      : p_(problem), full_(problem.map.y.group * problem.map.x.group), width_(padded<T>(problem.head_dim)) {
    memory_.allocate([&] { lay_out(backward); });
  }

  // One share of the work; dbias as in partition_attention.h.
  template <bool BACKWARD>
  void run(int64_t share, T* dbias) {
    const Division& work = p_.work;
    int64_t part = share % work.group_parts(), head_part = share / work.group_parts();
    int64_t group = work.first_group(part), groups = work.first_group(part + 1) - group;
    first_head_ = work.first_head(head_part);
    int64_t heads = work.first_head(head_part + 1) - first_head_;
    if (dbias) dbias += (part * work.heads + first_head_) * p_.bias_size;

    for (int64_t head = 0; head < heads; head++) spread_bias(first_head_ + head);
    locate(next_, group, first_head_);
    for (int64_t i = 1; i <= groups * heads; i++) {
      std::swap(here_, next_);
      next_.height = 0;
      if (i < groups * heads) locate(next_, group + i / heads, first_head_ + i % heads);
      if (here_.tokens() == 0) continue;
      if constexpr (BACKWARD)
        backward(dbias ? dbias + (here_.head - first_head_) * p_.bias_size : nullptr);
      else
        forward();
    }
    for (int64_t head = 0; dbias && head < heads; head++) fold(first_head_ + head, dbias + head * p_.bias_size);
  }

 private:
  void forward() {
    Fetch<S> fetch(next_, p_.head_dim * sizeof(S), {&p_.q, &p_.k, &p_.v}, {&p_.out});
    Group<T> group = gather_qkv();
    attend<T>(b_, here_.tokens(), here_.tokens(), width_, weigh_by(group, fetch), fetch);
    scatter(p_.out, b_.out, 1);
  }

  void backward(T* dbias) {
    Fetch<S> fetch(next_, p_.head_dim * sizeof(S), {&p_.q, &p_.k, &p_.v, &p_.dout}, {&p_.dq, &p_.dk, &p_.dv});
    Group<T> group = gather_qkv();
    gather(b_.dout, p_.dout, 1);
    int64_t tokens = here_.tokens();
    b_.v_transposed.stride = b_.dscores.stride = padded<T>(tokens);
    transpose_into<T>(b_.v_transposed, b_.v, tokens, width_);
    auto use = [&](int64_t begin, int64_t rows) {
      if (dbias) add_to_bias(group, begin, rows, dbias);
    };
    attend_backward<T>(b_, tokens, tokens, p_.head_dim, width_, block_, false, weigh_by(group, fetch), use, fetch);
    scatter(p_.dq, b_.out, T(p_.scale));
    scatter(p_.dk, b_.dk, 1);
    scatter(p_.dv, b_.dv, 1);
  }

  // Folds what the full groups of a head have added to the spread gradient.
  void fold(int64_t head, T* dbias) {
    if (!dspread_.data) return;
    add_to_table<T>(full_group(head), of_head(dspread_, head), 0, full_, dbias);
    std::memset(of_head(dspread_, head).data, 0, full_ * dspread_.stride * sizeof(T));
  }

  void lay_out(bool backward) {
    int64_t keys = padded<T>(full_), spread = full_ * keys <= SPREAD ? Division::HEADS * full_ : 0;
    block_ = backward ? least(full_, SCORES / keys + STEP) : least(full_, STEP);
    for (auto* rows : {&b_.q, &b_.k, &b_.v, &b_.out}) *rows = take(keys, width_);
    b_.k_transposed = take(width_, keys);
    b_.scores = take(block_ + 1, keys);
    spread_ = take(spread ? spread + 1 : 0, keys);
    if (backward) {
      for (auto* rows : {&b_.dout, &b_.dk, &b_.dv}) *rows = take(keys, width_);
      b_.v_transposed = take(width_, keys);
      b_.dscores = take(block_, keys);
      dspread_ = take(p_.bias ? spread : 0, keys);
    }
    for (auto& apart : apart_) apart = take(1, keys).data;
    sides_ = memory_.take<uint8_t>(keys);
    for (auto* site : {&here_, &next_}) {
      site->ys = memory_.take<int64_t>(p_.map.y.group);
      site->xs = memory_.take<int64_t>(p_.map.x.group);
    }
  }

  Matrix<T> take(int64_t rows, int64_t stride) { return memory_.take<T>(rows, stride); }

  void locate(Site& site, int64_t group, int64_t head) const {
    const Axis &y = p_.map.y, &x = p_.map.x;
    Place place = p_.map.place(group % p_.map.groups());
    site.image = group / p_.map.groups(), site.head = head;
    site.height = y.tokens(place.region_y, place.residue_y);
    site.width = x.tokens(place.region_x, place.residue_x);
    for (int64_t g = 0; g < site.height; g++) site.ys[g] = y.position(place.region_y, place.residue_y, g);
    for (int64_t g = 0; g < site.width; g++) site.xs[g] = x.position(place.region_x, place.residue_x, g);
  }

  void gather(Matrix<T> to, const View& from, T factor) {
    T* row = to.data;
    for (int64_t y = 0; y < here_.height; y++) {
      const S* line = line_of<S>(from, here_, y);
      for (int64_t x = 0; x < here_.width; x++, row += width_)
        copy_row(row, line + here_.xs[x] * from.x, p_.head_dim, factor);
    }
  }

  void scatter(const View& to, Matrix<T> from, T factor) {
    const T* row = from.data;
    for (int64_t y = 0; y < here_.height; y++) {
      S* line = line_of<S>(to, here_, y);
      for (int64_t x = 0; x < here_.width; x++, row += width_)
        copy_row(line + here_.xs[x] * to.x, row, p_.head_dim, factor);
    }
  }

  Group<T> full_group(int64_t head) const {
    const T* bias = p_.bias ? (const T*)p_.bias + head * p_.bias_size : nullptr;
    return {p_.map.y.group, p_.map.x.group, p_.map.y.group, p_.map.x.group, bias, apart_, nullptr};
  }

  Group<T> gather_qkv() {
    int64_t tokens = here_.tokens(), keys = padded<T>(tokens);
    gather(b_.q, p_.q, T(p_.scale));
    gather(b_.k, p_.k, 1);
    gather(b_.v, p_.v, 1);
    for (auto rows : {b_.k, b_.v})  // a fuller group may have been here before
      std::memset(rows.row(tokens), 0, (keys - tokens) * width_ * sizeof(T));
    b_.k_transposed.stride = b_.scores.stride = keys;
    transpose_into<T>(b_.k_transposed, b_.k, tokens, width_);
    Group<T> group = full_group(here_.head);
    group.height = here_.height, group.width = here_.width;
    if (mark_sides()) group.sides = sides_;
    return group;
  }

  // Whether the shift has brought tokens of opposite borders together; then also what the keys lose for each side of a
  // query.
  bool mark_sides() {
    const Axis &y = p_.map.y, &x = p_.map.x;
    const int64_t *ys = here_.ys, *xs = here_.xs;
    bool torn =
        y.wrapped(ys[0]) != y.wrapped(ys[here_.height - 1]) || x.wrapped(xs[0]) != x.wrapped(xs[here_.width - 1]);
    for (int64_t i = 0; torn && i < here_.tokens(); i++) {
      sides_[i] = 2 * y.wrapped(ys[i / here_.width]) + x.wrapped(xs[i % here_.width]);
      for (int side = 0; side < 4; side++) apart_[side][i] = sides_[i] == side ? 0 : SHIFT_PENALTY;
    }
    return torn;
  }

  // The rows of `head` in a matrix that has those of all heads of the share.
  Matrix<T> of_head(Matrix<T> rows, int64_t head) const { return rows.at((head - first_head_) * full_, 0); }

  void spread_bias(int64_t head) {
    if (spread_.data) start_scores<T>(full_group(head), of_head(spread_, head), 0, full_);
  }

  // What writes rows of softmax(scale q k^T + bias).
  auto weigh_by(const Group<T>& group, Fetch<S>& fetch) {
    return [&, this](int64_t begin, int64_t rows, Matrix<T> scores) {
      bool spread = spread_.data && group.tokens() == full_ && !group.sides;
      if (!spread) start_scores<T>(group, scores, begin, rows);
      Matrix<T> start = spread ? of_head(spread_, here_.head).at(begin, 0) : scores;
      multiply<T>(b_.q.at(begin, 0), b_.k_transposed, scores, rows, p_.head_dim, scores.stride, start, fetch);
      softmax<T>(scores, rows, scores.stride, fetch);
    };
  }

  void add_to_bias(const Group<T>& group, int64_t begin, int64_t rows, T* dbias) {
    if (!dspread_.data || group.tokens() != full_) return add_to_table<T>(group, b_.dscores, begin, rows, dbias);
    T* sum = of_head(dspread_, here_.head).row(begin);
    for (int64_t i = 0; i < rows * dspread_.stride; i += LANES<T>)
      store(sum + i, load(sum + i) + load(b_.dscores.data + i));
  }

  const PartitionAttention& p_;
  int64_t first_head_ = 0;            // of the share
  int64_t full_, width_, block_ = 0;  // tokens of a full group; head_dim, padded; rows of scores held
  Workspace memory_;                  // above all, the padding of head_dim is zero
  Site here_{}, next_{};
  Buffers<T> b_{};
  Matrix<T> spread_, dspread_{};
  T* apart_[4];
  uint8_t* sides_;
};

template <class S>
void forward(const PartitionAttention& problem, int64_t begin, int64_t end) {
  Worker<S> worker(problem, false);
  for (int64_t share = begin; share < end; share++) worker.template run<false>(share, nullptr);
}

template <class S>
void backward(const PartitionAttention& problem, int64_t begin, int64_t end, void* dbias) {
  Worker<S> worker(problem, true);
  for (int64_t share = begin; share < end; share++) worker.template run<true>(share, (Accumulation<S>*)dbias);
}

}  // namespace

PartitionAttentionKernels partition_attention_kernels() {
  return {
      {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
      {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
  };
}

}  // namespace vitkernels::VITKERNELS_LEVEL
