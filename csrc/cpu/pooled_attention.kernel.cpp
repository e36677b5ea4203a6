// Pooled attention, a block of queries at a time against all keys of its image and head, with the terms of relative
// positions as the start of the logits. Compiled once per vector level.
#include "pooled_attention.h"

#include <type_traits>

#include "attention.h"
#include "workspace.h"

namespace vitkernels::VITKERNELS_LEVEL {
namespace {

// Rows of scores and of their gradients that a backward pass holds: they, a block's queries and some hundreds of keys
// share the second cache.
constexpr int64_t HELD = 4 * STEP;

// Queries of one image and head: whole lines of their map, and before the first the class token.
struct Block {
  int64_t head;               // of all images
  int64_t first_line, lines;  // of the map
  int64_t lead;               // class tokens, 0 or 1
  int64_t first, tokens;      // of the image
};

// Queries of a block that share their coordinate along an axis, and so the terms: every `step`-th from `start` on.
struct Run {
  int axis;
  int64_t coordinate, start, step, count;
};

template <class S, class T = Accumulation<S>>
class Worker {
 public:
  Worker(const PooledAttention& problem, bool backward)
      : p_(problem), width_(padded<T>(problem.head_dim)), keys_(problem.key_tokens()) {
    for (int axis = 0; axis < 3; axis++) {
      offset_[axis] = columns_;
      if (has(axis)) columns_ += padded<T>(p_.keys.of(axis));
    }
    memory_.allocate([&] { lay_out(backward); });
    for (int64_t j = keys_; j < b_.scores.stride; j++) starts_[j] = T(-__builtin_inf());
    for (int64_t x = (p_.keys.w - 1) / LANES<T> * LANES<T>; x < p_.keys.w; x++) ends_[x % LANES<T>] = 1;
  }

  // Blocks [begin, end) of all heads.
  void forward(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      enter(locate(i), false);
      attend<T>(b_, block_.tokens, keys_, width_, weigh(), between_);
      add_residual(b_.q);
      leave(p_.out);
    }
  }

  // The parts of a share.
  void backward(const Partial& partial, int64_t share) {
    int64_t tasks = p_.batch * p_.heads * p_.parts(), terms = p_.terms_size * stride_;
    int64_t begin = share * tasks / p_.shares(), end = (share + 1) * tasks / p_.shares();
    dterms_ = (T*)partial.dterms + share * terms;
    std::memset((void*)dterms_, 0, terms * sizeof(T));
    for (int64_t task = begin; task < end; task++) {
      for (int64_t i = first_block(task); i < first_block(task + 1); i++) {
        enter(locate(i), true);
        backward(i > first_block(task));
      }
      hand_over(partial, task);
    }
  }

  // dk and dv of a head: the sums of its parts, in their order.
  void combine(const Partial& partial, int64_t head) {
    for (int64_t which : {0, 1})
      for (int64_t key = 0; key < keys_; key++) {
        T* sum = b_.k.data;  // whose keys are not loaded here
        std::memset((void*)sum, 0, width_ * sizeof(T));
        for (int64_t part = 0; part < p_.parts(); part++) {
          const T* row = partial_of(partial, part, head, which).row(key);
          for (int64_t d = 0; d < width_; d += LANES<T>) store(sum + d, load(sum + d) + load(row + d));
        }
        S* to = row_of(which ? p_.dv : p_.dk, head, key);
        copy_row(to, sum, p_.head_dim, which ? T(1) : T(p_.scale));
      }
  }

 private:
  bool has(int axis) const { return p_.terms[axis].rows; }

  void backward(bool add) {
    gather(b_.dout, p_.dout, block_.first, block_.tokens, 1);
    auto reduce = [this](int64_t begin, int64_t rows) {
      for (int64_t i = 0; columns_ && i < rows; i++) reduce_row(begin + i, b_.dscores.row(i));
    };
    attend_backward<T>(b_, block_.tokens, keys_, p_.head_dim, width_, held_, add, weigh(), reduce, between_);
    for_runs([&](const Run& run) {
      const Terms& axis = p_.terms[run.axis];
      int64_t first = axis.first[run.coordinate];
      Matrix<T> terms{(T*)axis.rows + first * stride_, stride_};
      Matrix<T> dterms{dterms_ + (axis.place + first) * stride_, stride_};
      Matrix<T> drel = rows_of(drel_, run);
      multiply<T>(drel, terms, rows_of(b_.out, run), run.count, p_.keys.of(run.axis), width_, true);
      multiply<T, true>(drel, rows_of(b_.q, run), dterms, p_.keys.of(run.axis), run.count, width_, true);
    });
    add_residual(b_.dout);
    leave(p_.dq);
  }

  // Block `index` of all heads.
  Block locate(int64_t index) const {
    int64_t head = index / p_.blocks(), block = index % p_.blocks(), lead = block == 0 ? p_.cls : 0;
    int64_t line = p_.first_line(block), lines = p_.first_line(block + 1) - line;
    return {head, line, lines, lead, p_.cls - lead + line * p_.queries.w, lead + lines * p_.queries.w};
  }

  // Of a part, among the blocks of all heads.
  int64_t first_block(int64_t task) const {
    return task / p_.parts() * p_.blocks() + p_.first_block(task % p_.parts());
  }

  // Gathers a block's queries, and takes the products with their terms; a head's keys and values where it begins.
  void enter(const Block& block, bool backward) {
    bool another = block.head != block_.head;
    block_ = block;
    if (another) load_keys(backward);
    b_.q = in_place(p_.q), b_.out = in_place(backward ? p_.dq : p_.out);
    if (!b_.out.data) b_.out = out_;
    if (!b_.q.data || backward) gather(b_.q = q_, p_.q, block.first, block.tokens, 1);
    for_runs([&](const Run& run) {
      const Terms& axis = p_.terms[run.axis];
      Matrix<T> terms{(T*)axis.transposed + axis.first[run.coordinate], axis.stride};
      int64_t columns = padded<T>(p_.keys.of(run.axis));  // beyond the keys there are others' terms
      multiply<T>(rows_of(b_.q, run), terms, rows_of(rel_, run), run.count, p_.head_dim, columns);
    });
  }

  void load_keys(bool backward) {
    gather(b_.k, p_.k, 0, keys_, T(p_.scale));
    gather(b_.v, p_.v, 0, keys_, 1);
    transpose_into<T>(b_.k_transposed, b_.k, keys_, width_);
    if (backward) transpose_into<T>(b_.v_transposed, b_.v, keys_, width_);
  }

  template <class Visit>
  void for_runs(Visit visit) {
    int64_t wide = p_.queries.w, high = p_.queries.h;
    for (int64_t i = 0; i < block_.lines; i++) {
      int64_t line = block_.first_line + i, start = block_.lead + i * wide;
      if (has(0)) visit(Run{0, line / high, start, 1, wide});
      if (has(1)) visit(Run{1, line % high, start, 1, wide});
    }
    for (int64_t x = 0; has(2) && x < wide; x++) visit(Run{2, x, block_.lead + x, wide, block_.lines});
  }

  // Of the queries' rows those of a run; of their products with terms, the columns of its axis.
  Matrix<T> rows_of(Matrix<T> rows, const Run& run) const {
    T* column = rows.data == rel_.data || rows.data == drel_.data ? rows.data + offset_[run.axis] : rows.data;
    return {column + run.start * rows.stride, run.step * rows.stride};
  }

  // What writes rows of softmax(scale q k^T + q . terms).
  auto weigh() {
    return [this](int64_t begin, int64_t rows, Matrix<T> scores) {
      Matrix<T> start = columns_ ? scores : Matrix<T>{starts_, 0};
      for (int64_t i = 0; columns_ && i < rows; i++) start_row(begin + i, scores.row(i));
      for (int64_t i = 0; i < rows; i++)  // what the weights' product would wait for
        for (int64_t d = 0; d < width_; d += 64 / sizeof(T)) __builtin_prefetch(b_.out.row(begin + i) + d, 1);
      multiply<T>(b_.q.at(begin, 0), b_.k_transposed, scores, rows, p_.head_dim, scores.stride, start);
      softmax<T>(scores, rows, scores.stride);
    };
  }

  // What relative positions add to the logits of a query. Every line of keys overwrites what the one before wrote too
  // far.
  void start_row(int64_t query, T* row) {
    if (query < block_.lead) return (void)std::memcpy((void*)row, starts_, b_.scores.stride * sizeof(T));
    row[0] = 0;  // of the class token, where there is one
    row += p_.cls;
    int64_t vectors = ceil_div(p_.keys.w, LANES<T>);
    vectors == 1 ? start_lines<1>(query, row) : vectors == 2 ? start_lines<2>(query, row) : start_lines<0>(query, row);
    store(row + p_.keys.lines() * p_.keys.w, broadcast(T(-__builtin_inf())));
  }

  // Of lines of VECTORS vectors, or of any number if 0.
  template <int VECTORS>
  void start_lines(int64_t query, T* row) {
    const T* axes[3];
    for (int axis = 0; axis < 3; axis++) axes[axis] = has(axis) ? rel_.row(query) + offset_[axis] : zeros_;
    const auto [t, h, w] = axes;
    const int64_t high = p_.keys.h, wide = p_.keys.w;
    Vec<T> along[VECTORS ? VECTORS : 1];
    for (int x = 0; x < VECTORS; x++) along[x] = load(w + x * LANES<T>);
    for (int64_t i = 0; i < p_.keys.t; i++)
      for (int64_t j = 0; j < high; j++, row += wide) {
        Vec<T> other = broadcast(t[i] + h[j]);
        for (int x = 0; x < VECTORS; x++) store(row + x * LANES<T>, along[x] + other);
        for (int64_t x = 0; !VECTORS && x < wide; x += LANES<T>) store(row + x, load(w + x) + other);
      }
  }

  // The gradient of a query's products with terms, from that of its logits.
  void reduce_row(int64_t query, const T* row) {
    if (query < block_.lead) return;
    T *drel = drel_.row(query), *t = drel + offset_[0], *h = drel + offset_[1], *w = drel + offset_[2];
    const bool over_t = has(0), over_h = has(1), over_w = has(2);
    const int64_t wide = p_.keys.w, lines = p_.keys.lines(), last = (wide - 1) / LANES<T> * LANES<T>;
    row += p_.cls;
    for (int64_t x = 0; over_w && x < wide; x += LANES<T>) {  // reads and writes over the end of a line
      Vec<T> sum{};
      for (int64_t line = 0; line < lines; line++) sum += load(row + line * wide + x);
      store(w + x, sum);
    }
    if (!over_t && !over_h) return;
    std::memset((void*)drel, 0, offset_[2] * sizeof(T));
    const Vec<T> ends = load(ends_);
    for (int64_t i = 0; i < p_.keys.t; i++)
      for (int64_t j = 0; j < p_.keys.h; j++, row += wide) {
        Vec<T> sum = ends > Vec<T>{} ? load(row + last) : Vec<T>{};
        for (int64_t x = 0; x < last; x += LANES<T>) sum += load(row + x);
        T total = sum_of<T>(sum)[0];
        if (over_t) t[i] += total;
        if (over_h) h[j] += total;
      }
  }

  // The queries, or their gradient, on top of what is in `out`.
  void add_residual(Matrix<T> from) {
    if (p_.residual == 0) return;
    for (int64_t i = p_.residual == 1 ? 0 : block_.lead; i < block_.tokens; i++)
      for (int64_t d = 0; d < width_; d += LANES<T>)
        store(b_.out.row(i) + d, load(b_.out.row(i) + d) + load(from.row(i) + d));
  }

  // head: of all images
  S* row_of(const View& view, int64_t head, int64_t token) const {
    return (S*)view.data + (head / p_.heads * view.batch + head % p_.heads * view.head + token * view.x);
  }

  void gather(Matrix<T> to, const View& from, int64_t first, int64_t count, T factor) {
    constexpr int64_t AHEAD = 8;  // rows: too far apart for the processor to foresee
    const S* row = row_of(from, block_.head, first);
    for (int64_t i = 0; i < count; i++, row += from.x) {
      const char* ahead = (const char*)(row + AHEAD * from.x);
      for (int64_t byte = 0; byte < p_.head_dim * int64_t(sizeof(S)); byte += 64) __builtin_prefetch(ahead + byte);
      copy_row(to.row(i), row, p_.head_dim, factor);
    }
  }

  // The block's rows of a tensor, where they lie if nothing needs to be converted or padded; else none.
  Matrix<T> in_place(const View& view) const {
    if constexpr (std::is_same_v<S, T>)
      if (dense()) return {row_of(view, block_.head, block_.first), view.x};
    return {nullptr, 0};
  }

  bool dense() const { return std::is_same_v<S, T> && p_.head_dim == width_; }

  void scatter(const View& to, Matrix<T> from, int64_t first, int64_t count, T factor) {
    S* row = row_of(to, block_.head, first);
    for (int64_t i = 0; i < count; i++) copy_row(row + i * to.x, from.row(i), p_.head_dim, factor);
  }

  // A block's output, where it was not written in place.
  void leave(const View& to) {
    if (b_.out.data == out_.data) scatter(to, out_, block_.first, block_.tokens, 1);
  }

  // dk and dv of a part.
  void hand_over(const Partial& partial, int64_t task) {
    if (p_.parts() == 1) {
      scatter(p_.dk, b_.dk, 0, keys_, T(p_.scale));
      scatter(p_.dv, b_.dv, 0, keys_, 1);
      return;
    }
    for (int64_t which : {0, 1})
      for (int64_t key = 0; key < keys_; key++) {
        T* to = partial_of(partial, task % p_.parts(), task / p_.parts(), which).row(key);
        copy_row(to, (which ? b_.dv : b_.dk).row(key), width_, T(1));
      }
  }

  Matrix<T> partial_of(const Partial& partial, int64_t part, int64_t head, int64_t which) const {
    int64_t index = (part * p_.batch * p_.heads + head) * 2 + which;
    return {(T*)partial.dkv + index * keys_ * stride_, stride_};
  }

  void lay_out(bool backward) {
    int64_t rows = padded<T>(keys_), tokens = p_.largest_block();
    held_ = least(tokens, backward ? HELD : STEP);
    if (!dense() || backward) q_ = take(tokens, width_);
    if (!dense()) out_ = take(tokens, width_);
    for (auto* matrix : {&b_.k, &b_.v}) *matrix = take(rows, width_);
    b_.k_transposed = take(width_, rows);
    b_.scores = take_scores(rows);
    rel_ = take(tokens, columns_);
    starts_ = memory_.take<T>(rows), zeros_ = memory_.take<T>(rows);
    ends_ = memory_.take<T>(LANES<T>);
    if (!backward) return;
    b_.dout = take(tokens, width_);
    for (auto* matrix : {&b_.dk, &b_.dv}) *matrix = take(rows, width_);
    b_.v_transposed = take(width_, rows);
    b_.dscores = take_scores(rows);
    drel_ = take(tokens, columns_);
  }

  Matrix<T> take(int64_t rows, int64_t stride) { return memory_.take<T>(rows, stride); }

  // The last line of the last row reaches over its end.
  Matrix<T> take_scores(int64_t stride) { return {memory_.take<T>(held_ * stride + LANES<T>), stride}; }

  const PooledAttention& p_;
  const int64_t width_, stride_ = padded_row<T>(p_.head_dim),
                        keys_;       // head_dim, padded, here and in what is handed over
  int64_t offset_[3], columns_ = 0;  // of the products with terms
  int64_t held_ = 0, head_ = -1;     // rows of scores; the head that is loaded
  Workspace memory_;                 // above all, the padding of head_dim and of the keys is zero
  Block block_{-1};
  Buffers<T> b_{};
  Matrix<T> q_{}, out_{}, rel_{}, drel_{};
  T *starts_ = nullptr, *zeros_ = nullptr, *ends_ = nullptr, *dterms_ = nullptr;
  Nothing between_;
};

template <class S>
void forward(const PooledAttention& problem, int64_t begin, int64_t end) {
  Worker<S>(problem, false).forward(begin, end);
}

template <class S>
void backward(const PooledAttention& problem, const Partial& partial, int64_t begin, int64_t end) {
  Worker<S> worker(problem, true);
  for (int64_t share = begin; share < end; share++) worker.backward(partial, share);
}

template <class S>
void combine(const PooledAttention& problem, const Partial& partial, int64_t begin, int64_t end) {
  Worker<S> worker(problem, false);
  for (int64_t head = begin; head < end; head++) worker.combine(partial, head);
}

}  // namespace

PooledAttentionKernels pooled_attention_kernels() {
  return {
      {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
      {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
      {combine<float>, combine<double>, combine<Half>, combine<BFloat16>},
  };
}

}  // namespace vitkernels::VITKERNELS_LEVEL
