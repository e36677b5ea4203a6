// Pooling of tokens over rows of windows: every window's sum or maximum in registers, then LayerNorm. Backward: rows of
// windows give the gradient of what was pooled, rows of tokens gather theirs from it. Compiled once per vector level.
#include "pool_tokens.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "layer_norm.h"
#include "workspace.h"

namespace vitkernels::VITKERNELS_LEVEL {
namespace {

constexpr int64_t BLOCK = 24;  // windows or tokens at a time

template <class S>
VITKERNELS_INLINE S* row_of(const View& view, int64_t image, int64_t token, int64_t head) {
  return (S*)view.data + (image * view.batch + token * view.x + head * view.head);
}

// One tap of a row of windows: its weights [d], and the token's row [d] for each place along the row.
template <class T>
struct Tap {
  const T* weights;
  const T* const* rows;
};

// What a window does with the rows of its taps. Lanes of the padding come out as zero.
template <class T>
struct Sum {
  static VITKERNELS_INLINE Vec<T> start() { return Vec<T>{}; }
  static VITKERNELS_INLINE Vec<T> step(Vec<T> sum, const T* x, Vec<T> weight, int64_t) {
    return sum + load(x) * weight;
  }
};

template <class T>
struct Maximum {  // NaN where there is one
  static VITKERNELS_INLINE Vec<T> start() { return broadcast(T(-__builtin_inf())); }
  static VITKERNELS_INLINE Vec<T> step(Vec<T> largest, const T* x, Vec<T>, int64_t) {
    Vec<T> value = load(x);
    return (value > largest) | (value != value) ? value : largest;
  }
};

template <class T>
struct SumOfWon {  // of gradients whose winner, `apart` elements behind, is this tap
  static VITKERNELS_INLINE Vec<T> start() { return Vec<T>{}; }
  static VITKERNELS_INLINE Vec<T> step(Vec<T> sum, const T* gradient, Vec<T> tap, int64_t apart) {
    return sum + (load(gradient + apart) == tap ? load(gradient) : Vec<T>{});
  }
};

// visit(constant n), 1 <= n <= MOST
template <int MOST, class Visit>
VITKERNELS_INLINE void with_constant(int64_t n, Visit visit) {
  if constexpr (MOST > 1) {
    if (n < MOST) return with_constant<MOST - 1>(n, visit);
  }
  visit(std::integral_constant<int, MOST>());
}

// visit(i, constant n) for i = 0, n, ...: as even parts of `count` as there are with n <= MOST.
template <int MOST, class Visit>
VITKERNELS_INLINE void for_tiles(int64_t count, Visit visit) {
  for (int64_t i = 0, tile; i < count; i += tile) {
    tile = share_of(count - i, MOST);
    with_constant<MOST>(tile, [&](auto n) { visit(i, n); });
  }
}

// visit(d) for groups of vectors of a row of `size` elements, the last moved back so that it ends with the row.
template <class T, int VECTORS, class Visit>
VITKERNELS_INLINE void for_groups(int64_t size, Visit visit) {
  for (int64_t d = 0; d < size; d += VECTORS * LANES<T>) visit(least(d, size - VECTORS * LANES<T>));
}

// Brings rows near that the next line of windows or of tokens will use, a few at every call (see
// partition_attention.kernel.cpp).
class Fetch {
 public:
  // Forgets what was not brought. All that is added from here on is brought by `calls` calls.
  void start(int64_t row_bytes, int64_t calls) {
    row_bytes_ = row_bytes, calls_ = calls, due_ = rows_ = runs_ = run_ = row_ = 0;
  }

  // Rows first + stride * place, for `count` places (null: the first ones), to be read or to be written.
  template <class S>
  void add(const S* first, int64_t stride, int64_t count, const int64_t* places, bool write) {
    if (runs_ == MAX_RUNS || count == 0) return;
    run_of_[runs_++] = {(const char*)first, stride * (int64_t)sizeof(S), count, places, write};
    rows_ += count;
  }

  VITKERNELS_INLINE void operator()() {
    for (due_ += rows_; due_ > 0 && run_ < runs_; due_ -= calls_) {
      const Run& run = run_of_[run_];
      const char* row = run.first + (run.places ? run.places[row_] : row_) * run.stride;
      if (run.write)
        for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 1, 2);
      else
        for (int64_t byte = 0; byte < row_bytes_; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++row_ == run.count) row_ = 0, run_++;
    }
  }

 private:
  struct Run {
    const char* first;
    int64_t stride, count;  // bytes, rows
    const int64_t* places;
    bool write;
  };
  static constexpr int64_t MAX_RUNS = 16;

  int64_t row_bytes_ = 0, calls_ = 1;
  int64_t due_ = 0, rows_ = 0, runs_ = 0, run_ = 0, row_ = 0;  // due_: rows to be brought, times calls_
  Run run_of_[MAX_RUNS];
};

// Rows to[0, COUNT), of which each takes its taps `step` places after the one before it.
template <class Use, class T, int VECTORS, int COUNT>
void pool_tile(const Tap<T>* taps, int64_t number, int64_t place, int64_t step, int64_t size, Matrix<T> to,
               int64_t apart, Fetch& fetch) {
  int64_t places[COUNT];
  for (int i = 0; i < COUNT; i++) places[i] = place + i * step;
  for_groups<T, VECTORS>(size, [&](int64_t d) {
    Vec<T> sum[COUNT][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) sum[i][j] = Use::start();
#pragma GCC unroll 1
    for (int64_t k = 0; k < number; k++) {
      Vec<T> weight[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) weight[j] = load(taps[k].weights + d + j * LANES<T>);
      const T* const* rows = taps[k].rows;
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; i++) {
        const T* row = rows[places[i]] + d;
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++) sum[i][j] = Use::step(sum[i][j], row + j * LANES<T>, weight[j], apart);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) store(to.row(i) + d + j * LANES<T>, sum[i][j]);
    fetch();
  });
}

// gradients[tap] = the sum over the windows of dpooled times the tap's token.
template <class T, int VECTORS, int TAPS>
void correlate_tile(const Tap<T>* taps, int64_t windows, int64_t step, int64_t size, Matrix<T> dpooled,
                    Matrix<T> gradients) {
  for_groups<T, VECTORS>(size, [&](int64_t d) {
    Vec<T> sum[TAPS][VECTORS] = {};
#pragma GCC unroll 1
    for (int64_t i = 0; i < windows; i++) {
      Vec<T> factor[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) factor[j] = load(dpooled.row(i) + d + j * LANES<T>);
#pragma GCC unroll 16
      for (int k = 0; k < TAPS; k++) {
        const T* row = taps[k].rows[i * step] + d;
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; j++) sum[k][j] += load(row + j * LANES<T>) * factor[j];
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < TAPS; k++)
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) store(gradients.row(k) + d + j * LANES<T>, sum[k][j]);
  });
}

// Places along rows of tokens or windows: for each the address of its row [d]. Rows are found again by a number.
template <class T>
class Places {
 public:
  void lay_out(Workspace& memory, int64_t slots, int64_t places) {
    places_ = places, slots_ = slots;
    rows_ = memory.take<const T*>(slots * places);
    numbers_ = memory.take<int64_t>(slots);
  }

  VITKERNELS_INLINE int64_t size() const { return places_; }

  void fill(const T* row) { std::fill_n(rows_, slots_ * places_, row); }

  // What fill(addresses) wrote for row `number` into its slot.
  template <class Fill>
  VITKERNELS_INLINE const T* const* find(int64_t slot, int64_t number, Fill fill) {
    const T** rows = rows_ + slot * places_;
    if (numbers_[slot] != number + 1) fill(rows);  // 0: none
    numbers_[slot] = number + 1;
    return rows;
  }

 private:
  int64_t places_ = 0, slots_ = 0;
  const T** rows_ = nullptr;
  int64_t* numbers_ = nullptr;
};

enum class Pass { FORWARD, BACKWARD_WINDOWS, BACKWARD_TOKENS };

template <class S, class T = Accumulation<S>>
class Worker {
 public:
  Worker(const PoolTokens& problem, Pass pass)
      : p_(problem),
        size_(problem.row_size()),
        direct_(SAME && problem.head_dim >= LANES<T>),
        width_(std::max<int64_t>(problem.head_dim, LANES<T>)),
        vectors_(least(share_of(ceil_div(width_, LANES<T>), MAX_VECTORS), width_ / LANES<T>)),
        norm_(problem.head_dim, parameter(problem.taps()), parameter(problem.taps() + 1), problem.eps) {
    memory_.allocate([&] { pass == Pass::BACKWARD_TOKENS ? lay_out_tokens() : lay_out_windows(pass); });
    if (pass != Pass::BACKWARD_TOKENS) find_seen_tokens();
    if (p_.maximum && pass == Pass::BACKWARD_TOKENS)
      std::fill_n(padding_ + size_, size_, T(-1));  // no tap's number
    else if (p_.maximum)
      std::fill_n(padding_, size_, T(-__builtin_inf()));
  }

  void forward(int64_t begin, int64_t end) {
    for_rows_of_windows(begin, end, [&](int64_t image, int64_t line, int64_t head) {
      int64_t first = first_window(line), windows = line < 0 ? 1 : p_.w.windows();
      if (line >= 0) find_taps_of_windows(image, line, head), fetch_windows(image, line + 1, head, p_.out, true);
      for (int64_t i = 0, count; i < windows; i += count) {
        count = share_of(windows - i, BLOCK);
        pool_block(image, line, head, i, count);
        S* out = row_of<S>(p_.out, image, first + i, head);
        if (p_.norm)
          for_tiles<NORM_ROWS>(count, [&](int64_t k, auto rows) {
            norm_.template forward<rows>(block_.at(k, 0), out + k * p_.out.x, p_.out.x);
          });
        else
          store_rows(out, p_.out.x, block_, count);
      }
    });
  }

  // Windows: the gradient of what was pooled, and the parameters'.
  void backward_windows(int64_t begin, int64_t end, T* gradients) {
    for_rows_of_windows(begin, end, [&](int64_t image, int64_t line, int64_t head) {
      bool cls = line < 0, pooled = !cls && (p_.norm || p_.learned || p_.maximum);
      int64_t windows = cls ? 1 : p_.w.windows();
      T* dnorm = gradients + (p_.gradients() - 2) * size_;
      Matrix<T> to = cls ? dcls_ : dpooled(image, line / p_.h.windows(), line % p_.h.windows(), head);
      if (pooled) find_taps_of_windows(image, line, head), fetch_windows(image, line + 1, head, p_.dout, false);
      for (int64_t i = 0, count; i < windows; i += count) {
        count = share_of(windows - i, BLOCK);
        Matrix<T> dout = find_dout(row_of<S>(p_.dout, image, first_window(line) + i, head), count);
        if (p_.norm || (pooled && p_.maximum)) pool_block(image, line, head, i, count, to.at(i, size_).data);
        if (p_.norm)
          for_tiles<NORM_ROWS>(count, [&](int64_t k, auto rows) {
            norm_.template backward<rows>(block_.at(k, 0), dout.at(k, 0), to.at(i + k, 0), dnorm, dnorm + size_);
          });
        else
          for (int64_t k = 0; k < count; k++) copy_row(to.row(i + k), dout.row(k), p_.head_dim, T(1));
      }
      if (cls) store_rows(row_of<S>(p_.dx, image, 0, head), 0, dcls_, 1);
      if (!cls && p_.learned) correlate(to, gradients);
    });
  }

  // Tokens: each gathers its gradient from the windows that saw it.
  void backward_tokens(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      int64_t line = row % p_.rows_of_tokens(), image = row / p_.rows_of_tokens();
      for (int64_t head = 0; head < p_.heads; head++) {
        fetch_tokens(image, line + 1, head);
        for (int64_t residue = 0; residue < p_.w.stride; residue++) {
          find_taps_of_tokens(image, line, head, residue);
          gather_tokens(line_of_tokens(p_.dx, image, line, head), residue);
        }
      }
    }
  }

 private:
  static constexpr bool SAME = std::is_same_v<S, T>;
  static constexpr int NORM_ROWS = LayerNorm<T>::MAX_ROWS;

  void lay_out_windows(Pass pass) {
    int64_t slots = p_.t.kernel * p_.h.kernel * p_.heads;
    int64_t places = std::max(p_.w.first_token(p_.w.windows() - 1) + p_.w.kernel, p_.w.tokens) + p_.w.padding;
    places_.lay_out(memory_, slots, places);
    seen_tokens_ = memory_.take<int64_t>(p_.w.tokens);
    copies_ = memory_.take<T>(direct_ ? 0 : slots * p_.w.tokens, size_);
    padding_ = memory_.take<T>(size_);
    taps_ = memory_.take<Tap<T>>(p_.taps());
    block_ = memory_.take<T>(BLOCK, size_);
    if (pass == Pass::FORWARD) return;
    dout_ = memory_.take<T>(BLOCK, size_);
    dcls_ = memory_.take<T>(1, size_);
    sums_ = memory_.take<T>(p_.taps(), size_);
  }

  void lay_out_tokens() {
    places_.lay_out(memory_, p_.t.overlap() * p_.h.overlap() * p_.heads,
                    margin() + (p_.w.tokens + p_.w.padding - 1) / p_.w.stride + 1);
    padding_ = memory_.take<T>(p_.pooled_size());
    taps_ = memory_.take<Tap<T>>(p_.taps());
    block_ = memory_.take<T>(BLOCK, size_);
  }

  // Places are in the padding but for those of tokens that windows see.
  void find_seen_tokens() {
    places_.fill(padding_);
    for (int64_t x = 0; x < p_.w.tokens; x++) {
      int64_t place = x + p_.w.padding, last = std::min(place / p_.w.stride, p_.w.windows() - 1);
      if (place - last * p_.w.stride < p_.w.kernel) seen_tokens_[seen_++] = x;
    }
  }

  VITKERNELS_INLINE const T* parameter(int64_t row) const { return (const T*)p_.parameters + row * size_; }

  // Of windows (t, y, 0), (t, y, 1), ... of a head.
  VITKERNELS_INLINE Matrix<T> dpooled(int64_t image, int64_t t, int64_t y, int64_t head) const {
    int64_t line = (image % p_.images * p_.t.windows() + t) * p_.h.windows() + y, size = p_.pooled_size();
    return {(T*)p_.dpooled + (line * p_.heads + head) * p_.w.windows() * size, size};
  }

  // visit(image, line, head) for rows of windows, all heads of one line after the other, since their tokens are
  // neighbours. The class token is line -1.
  template <class Visit>
  VITKERNELS_INLINE void for_rows_of_windows(int64_t begin, int64_t end, Visit visit) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t head = 0; head < p_.heads; head++) visit(row / p_.rows(), row % p_.rows() - p_.cls, head);
  }

  VITKERNELS_INLINE S* line_of_tokens(const View& view, int64_t image, int64_t line, int64_t head) const {
    return row_of<S>(view, image, p_.cls + line * p_.w.tokens, head);
  }

  // In the output.
  int64_t first_window(int64_t line) const { return line < 0 ? 0 : p_.cls + line * p_.w.windows(); }

  void find_taps_of_windows(int64_t image, int64_t line, int64_t head) {
    int64_t first_t = p_.t.first_token(line / p_.h.windows()), first_y = p_.h.first_token(line % p_.h.windows());
    number_ = 0;
    for (int64_t i = 0; i < p_.t.kernel; i++)
      for (int64_t j = 0; j < p_.h.kernel; j++) {
        int64_t t = first_t + i, y = first_y + j;
        if (t < 0 || t >= p_.t.tokens || y < 0 || y >= p_.h.tokens) continue;
        const T* const* rows = find_tokens(image, t, y, head);
        for (int64_t k = 0; k < p_.w.kernel; k++)
          taps_[number_++] = {parameter((i * p_.h.kernel + j) * p_.w.kernel + k), rows + k};
      }
  }

  // Fetches what a line of windows reads that the lines before it did not, and its row of out or dout. Windows that
  // have no tokens in common leave no time for that.
  void fetch_windows(int64_t image, int64_t line, int64_t head, const View& view, bool write) {
    start_fetch(p_.w.windows());
    if (line == p_.t.windows() * p_.h.windows() || p_.h.stride >= p_.h.kernel) return;
    auto [first_t, last_t] = unseen(p_.t, line / p_.h.windows());
    auto [first_y, last_y] = unseen(p_.h, line % p_.h.windows());
    for (int64_t t = first_t; t < last_t; t++)
      for (int64_t y = first_y; y < last_y; y++)
        fetch_.add(line_of_tokens(p_.x, image, t * p_.h.tokens + y, head), p_.x.x, seen_, seen_tokens_, false);
    fetch_.add(row_of<S>(view, image, first_window(line), head), view.x, p_.w.windows(), nullptr, write);
  }

  // From where to where a window has tokens that the one before it has not.
  static std::pair<int64_t, int64_t> unseen(const PoolAxis& axis, int64_t window) {
    int64_t first = axis.first_token(window), before = window ? first - axis.stride + axis.kernel : 0;
    return {std::max(first, before), least(first + axis.kernel, axis.tokens)};
  }

  // Fetches a line of dx.
  void fetch_tokens(int64_t image, int64_t line, int64_t head) {
    start_fetch(p_.w.tokens);
    if (line == p_.rows_of_tokens()) return;
    fetch_.add(line_of_tokens(p_.dx, image, line, head), p_.dx.x, p_.w.tokens, nullptr, true);
  }

  // For so many rows that pool() is about to make.
  void start_fetch(int64_t rows) {
    int64_t groups = ceil_div(width_, vectors_ * LANES<T>);
    fetch_.start(p_.head_dim * sizeof(S), groups * ceil_div(rows, tile_rows(int(vectors_))));
  }

  // The tokens of a line from the first window's first to the last window's last, in the padding or not.
  const T* const* find_tokens(int64_t image, int64_t t, int64_t y, int64_t head) {
    int64_t slot = (t % p_.t.kernel * p_.h.kernel + y % p_.h.kernel) * p_.heads + head;
    int64_t line = t * p_.h.tokens + y;
    return places_.find(slot, image * p_.rows_of_tokens() + line, [&](const T** rows) {
      const S* from = line_of_tokens(p_.x, image, line, head);
      for (int64_t i = 0; i < seen_; i++) {
        int64_t x = seen_tokens_[i];
        rows[p_.w.padding + x] = find_token(from + x * p_.x.x, slot * p_.w.tokens + x);
      }
    });
  }

  // A token's row where it lies, or converted.
  VITKERNELS_INLINE const T* find_token(const S* from, int64_t copy) {
    if constexpr (SAME) {
      if (direct_) return from;
    }
    load_rows(copies_.at(copy, 0), from, 0, 1);
    return copies_.row(copy);
  }

  // visit(tap, window) for the windows along an axis that hold a token.
  template <class Visit>
  VITKERNELS_INLINE static void for_windows(const PoolAxis& axis, int64_t token, Visit visit) {
    int64_t place = token + axis.padding;
    for (int64_t tap = place % axis.stride; tap < axis.kernel && tap <= place; tap += axis.stride)
      if ((place - tap) / axis.stride < axis.windows()) visit(tap, (place - tap) / axis.stride);
  }

  // Of the tokens of a line whose place in the padded map leaves `residue` when divided by the stride: their windows
  // are neighbours, as with a stride of 1.
  void find_taps_of_tokens(int64_t image, int64_t line, int64_t head, int64_t residue) {
    number_ = 0;
    for_windows(p_.t, line / p_.h.tokens, [&](int64_t i, int64_t t) {
      for_windows(p_.h, line % p_.h.tokens, [&](int64_t j, int64_t y) {
        const T* const* rows = find_windows(image, t, y, head);
        for (int64_t k = residue; k < p_.w.kernel; k += p_.w.stride)
          taps_[number_++] = {parameter((i * p_.h.kernel + j) * p_.w.kernel + k), rows - k / p_.w.stride};
      });
    });
  }

  // The windows of a line, from margin() before the first to the last that a token can reach.
  const T* const* find_windows(int64_t image, int64_t t, int64_t y, int64_t head) {
    int64_t slot = (t % p_.t.overlap() * p_.h.overlap() + y % p_.h.overlap()) * p_.heads + head;
    return places_.find(slot, (image * p_.t.windows() + t) * p_.h.windows() + y, [&](const T** rows) {
      Matrix<T> windows = dpooled(image, t, y, head);
      for (int64_t place = 0; place < places_.size(); place++) {
        int64_t x = place - margin();
        rows[place] = x >= 0 && x < p_.w.windows() ? windows.row(x) : padding_;
      }
    });
  }

  int64_t margin() const { return p_.w.overlap() - 1; }

  // Their gradients, for the tokens of find_taps_of_tokens(). line: dx of its first.
  void gather_tokens(S* line, int64_t residue) {
    int64_t stride = p_.w.stride, first = (residue - p_.w.padding % stride + stride) % stride;
    int64_t place = margin() + (first + p_.w.padding) / stride;
    int64_t tokens = p_.w.tokens > first ? ceil_div(p_.w.tokens - first, stride) : 0;
    for (int64_t i = 0, count; i < tokens; i += count) {
      count = share_of(tokens - i, BLOCK);
      S* to = line + (first + i * stride) * p_.dx.x;
      if constexpr (SAME) {
        if (direct_) {
          gather(place + i, count, {to, stride * p_.dx.x});
          continue;
        }
      }
      gather(place + i, count, block_);
      store_rows(to, stride * p_.dx.x, block_, count);
    }
  }

  void gather(int64_t place, int64_t count, Matrix<T> to) {
    p_.maximum ? pool<SumOfWon<T>>(place, count, 1, to) : pool<Sum<T>>(place, count, 1, to);
  }

  // Rows to[0, count) from the taps, `step` places apart.
  template <class Use>
  void pool(int64_t place, int64_t count, int64_t step, Matrix<T> to) {
    with_constant<MAX_VECTORS>(vectors_, [&](auto vectors) {
      for_tiles<tile_rows(vectors)>(count, [&](int64_t i, auto tile) {
        pool_tile<Use, T, vectors, tile>(taps_, number_, place + i * step, step, width_, to.at(i, 0), size_, fetch_);
      });
    });
  }

  // block_ = what windows [begin, begin + count) give, or the class token. `winners`: of a maximum, in backward.
  void pool_block(int64_t image, int64_t line, int64_t head, int64_t begin, int64_t count, T* winners = nullptr) {
    int64_t place = begin * p_.w.stride;
    if (line < 0)
      load_rows(block_, row_of<S>(p_.x, image, 0, head), 0, 1);
    else if (!p_.maximum)
      pool<Sum<T>>(place, count, p_.w.stride, block_);
    else if (!winners)
      pool<Maximum<T>>(place, count, p_.w.stride, block_);
    else
      for (int64_t i = 0; i < count; i++)
        choose(place + i * p_.w.stride, block_.row(i), winners + i * p_.pooled_size());
  }

  // Value and tap of the first of a window's largest rows; the last NaN where there is one.
  void choose(int64_t place, T* value, T* winner) const {
    const T* first = taps_[std::max(p_.w.padding - place, int64_t(0))].weights;
    for_vectors<T>(width_, [&](int64_t d) {
      Vec<T> largest = Maximum<T>::start(), tap = load(first + d);
      for (int64_t k = 0; k < number_; k++) {
        Vec<T> x = load(taps_[k].rows[place] + d);
        auto wins = (x > largest) | (x != x);
        largest = wins ? x : largest, tap = wins ? load(taps_[k].weights + d) : tap;
      }
      store(value + d, largest), store(winner + d, tap);
    });
  }

  // The gradients of the taps gain those of a row of windows, summed on its own, so that rounding errors do not add up
  // along all rows.
  void correlate(Matrix<T> dpooled, T* gradients) {
    with_constant<MAX_VECTORS>(vectors_, [&](auto vectors) {
      for_tiles<tile_rows(vectors)>(number_, [&](int64_t k, auto taps) {
        correlate_tile<T, vectors, taps>(taps_ + k, p_.w.windows(), p_.w.stride, width_, dpooled, sums_.at(k, 0));
      });
    });
    for (int64_t k = 0; k < number_; k++) {
      T* to = gradients + (taps_[k].weights - parameter(0));
      for (int64_t d = 0; d < size_; d += LANES<T>) store(to + d, load(to + d) + load(sums_.row(k) + d));
    }
  }

  // Rows of dout where they lie, or converted.
  VITKERNELS_INLINE Matrix<T> find_dout(S* from, int64_t count) {
    if constexpr (SAME) {
      if (p_.head_dim % LANES<T> == 0) return {from, p_.dout.x};
    }
    load_rows(dout_, from, p_.dout.x, count);
    return dout_;
  }

  void load_rows(Matrix<T> to, const S* from, int64_t stride, int64_t count) const {
    for (int64_t i = 0; i < count; i++) copy_row(to.row(i), from + i * stride, p_.head_dim, T(1));
  }

  void store_rows(S* to, int64_t stride, Matrix<T> from, int64_t count) const {
    for (int64_t i = 0; i < count; i++) copy_row(to + i * stride, from.row(i), p_.head_dim, T(1));
  }

  const PoolTokens& p_;
  const int64_t size_;             // of rows in memory of the kernels' own
  const bool direct_;              // rows of the tensors are read and written in full vectors of T
  const int64_t width_, vectors_;  // of rows, as they are read: elements, and in a tile
  const LayerNorm<T> norm_;
  Workspace memory_;
  Places<T> places_;
  Fetch fetch_;
  int64_t seen_ = 0, *seen_tokens_ = nullptr;  // of a line, those that windows see
  Matrix<T> copies_{};                         // converted tokens
  T* padding_;                                 // the row of a place outside the map
  Tap<T>* taps_;
  int64_t number_ = 0;                   // of taps inside the map
  Matrix<T> block_{}, dout_{}, dcls_{};  // [BLOCK, row_size], [1, row_size]
  Matrix<T> sums_{};                     // [taps, row_size]
};

template <class S>
void forward(const PoolTokens& problem, int64_t begin, int64_t end) {
  Worker<S>(problem, Pass::FORWARD).forward(begin, end);
}

template <class S>
void backward_windows(const PoolTokens& problem, int64_t shares, int64_t begin, int64_t end, void* gradients) {
  Worker<S> worker(problem, Pass::BACKWARD_WINDOWS);
  auto* to = (Accumulation<S>*)gradients;
  for (int64_t share = begin; share < end; share++, to += problem.gradients() * problem.row_size()) {
    int64_t start = share / shares * problem.rows(), part = share % shares;
    worker.backward_windows(start + part * problem.rows() / shares, start + (part + 1) * problem.rows() / shares, to);
  }
}

template <class S>
void backward_tokens(const PoolTokens& problem, int64_t begin, int64_t end) {
  Worker<S>(problem, Pass::BACKWARD_TOKENS).backward_tokens(begin, end);
}

}  // namespace

PoolTokensKernels pool_tokens_kernels() {
  return {
      {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
      {backward_windows<float>, backward_windows<double>, backward_windows<Half>, backward_windows<BFloat16>},
      {backward_tokens<float>, backward_tokens<double>, backward_tokens<Half>, backward_tokens<BFloat16>},
  };
}

}  // namespace vitkernels::VITKERNELS_LEVEL
