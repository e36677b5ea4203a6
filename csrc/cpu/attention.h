// Attention of one group and one head, forward and backward, on rows that were gathered into local buffers. The only
// softmax.
#pragma once

#include "matrix.h"

namespace vitkernels::VITKERNELS_LEVEL {

// Logits become weights; the padding holds -infinity, and a row of nothing else becomes 0. ROWS at a time, since one row
// is a chain of dependent steps.
template <class T, int ROWS>
void softmax_tile(Matrix<T> scores, int64_t columns) {
  Vec<T> largest[ROWS], sum[ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) largest[i] = load(scores.row(i));
  for (int64_t j = LANES<T>; j < columns; j += LANES<T>)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) largest[i] = max<T>(load(scores.row(i) + j), largest[i]);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    T highest = max_of<T>(largest[i])[0];
    largest[i] = broadcast(highest == T(-__builtin_inf()) ? T(0) : highest), sum[i] = Vec<T>{};
  }
  for (int64_t j = 0; j < columns; j += LANES<T>)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      Vec<T> weight = exp<T>(load(scores.row(i) + j) - largest[i]);
      store(scores.row(i) + j, weight);
      sum[i] += weight;
    }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    T total = sum_of<T>(sum[i])[0];
    sum[i] = broadcast(1 / (total == 0 ? T(1) : total));
  }
  for (int64_t j = 0; j < columns; j += LANES<T>)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) store(scores.row(i) + j, load(scores.row(i) + j) * sum[i]);
}

// dlogits = weights * (dweights - rowsum(weights * dweights)), in place of dweights.
template <class T, int ROWS>
void softmax_backward_tile(Matrix<T> weights, Matrix<T> dweights, int64_t columns) {
  Vec<T> delta[ROWS] = {};
  for (int64_t j = 0; j < columns; j += LANES<T>)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) delta[i] += load(weights.row(i) + j) * load(dweights.row(i) + j);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) delta[i] = sum_of<T>(delta[i]);
  for (int64_t j = 0; j < columns; j += LANES<T>)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      T* out = dweights.row(i) + j;
      store(out, load(weights.row(i) + j) * (load(out) - delta[i]));
    }
}

template <class T, class Between = Nothing>
void softmax(Matrix<T> scores, int64_t rows, int64_t columns, Between&& between = {}) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, between()) softmax_tile<T, 4>({scores.row(i), scores.stride}, columns);
  for (; i < rows; i++) softmax_tile<T, 1>({scores.row(i), scores.stride}, columns);
}

template <class T>
void softmax_backward(Matrix<T> weights, Matrix<T> dweights, int64_t rows, int64_t columns) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    softmax_backward_tile<T, 4>({weights.row(i), weights.stride}, {dweights.row(i), dweights.stride}, columns);
  for (; i < rows; i++)
    softmax_backward_tile<T, 1>({weights.row(i), weights.stride}, {dweights.row(i), dweights.stride}, columns);
}

// Rows of scores computed at a time: few enough for the nearest cache, a multiple of a tile's.
constexpr int64_t STEP = 18;
// Scores that a backward pass holds at a time (all of a group of up to 181 tokens).
constexpr int64_t SCORES = 32 * 1024;

// Queries and the keys they attend to, gathered into local buffers of padded rows.
template <class T>
struct Buffers {
  Matrix<T> q, k, v, out;  // out takes dq in a backward pass
  Matrix<T> k_transposed, scores;
  Matrix<T> dout, dk, dv, v_transposed, dscores;  // of a backward pass

  // The same from query `query` and key `key` on.
  VITKERNELS_INLINE Buffers from(int64_t query, int64_t key) const {
    Buffers b = *this;
    b.q = q.at(query, 0), b.out = out.at(query, 0), b.dout = dout.at(query, 0);
    b.k = k.at(key, 0), b.v = v.at(key, 0), b.dk = dk.at(key, 0), b.dv = dv.at(key, 0);
    b.k_transposed = k_transposed.at(0, key), b.v_transposed = v_transposed.at(0, key);
    return b;
  }
};

// out = weights v. `weigh(i, rows, scores)` writes rows [i, i + rows) of the weights.
template <class T, class Weigh, class Between>
void attend(const Buffers<T>& b, int64_t queries, int64_t keys, int64_t width, Weigh weigh, Between& between) {
  for (int64_t i = 0, rows; i < queries; i += rows) {
    rows = share_of(queries - i, STEP);
    weigh(i, rows, b.scores);
    multiply<T>(b.scores, b.v, b.out.at(i, 0), rows, keys, width, false, between);
  }
}

// out = dq / scale, dk and dv, which are added to if `add`; q is scaled. At most `most` rows of scores are held at a
// time; `use(i, rows)` sees their gradients, in dscores.
template <class T, class Weigh, class Use, class Between>
void attend_backward(const Buffers<T>& b, int64_t queries, int64_t keys, int64_t head_dim, int64_t width, int64_t most,
                     bool add, Weigh weigh, Use use, Between& between) {
  for (int64_t begin = 0, held; begin < queries; begin += held) {
    held = share_of(queries - begin, most);
    for (int64_t i = begin, rows; i < begin + held; i += rows) {
      rows = share_of(begin + held - i, STEP);
      Matrix<T> scores = b.scores.at(i - begin, 0), dscores = b.dscores.at(i - begin, 0);
      weigh(i, rows, scores);
      multiply<T>(b.dout.at(i, 0), b.v_transposed, dscores, rows, head_dim, dscores.stride, false, between);
      softmax_backward<T>(scores, dscores, rows, dscores.stride);
    }
    multiply<T, true>(b.scores, b.dout.at(begin, 0), b.dv, keys, held, width, add, between);
    multiply<T, true>(b.dscores, b.q.at(begin, 0), b.dk, keys, held, width, add, between);
    multiply<T>(b.dscores, b.k, b.out.at(begin, 0), held, keys, width, false, between);
    add = true;
    use(begin, held);
  }
}

constexpr int SHIFT_PENALTY = -100;  // as every published Swin has it

// One group: `height` x `width` tokens, the first ones of a group of `group_height` x `group_width` that reaches over
// the map.
template <class T>
struct Group {
  int64_t height, width, group_height, group_width;
  const T* bias;    // [2Gh-1, 2Gw-1], key minus query, and a vector's slack behind it; null for none
  T* const* apart;  // per side of a query (one bit per axis): what its logits with each key lose; null where nothing
  const uint8_t* sides;  // the side of each token

  VITKERNELS_INLINE int64_t tokens() const { return height * width; }

  // Where the offsets from query i to the keys of line y begin in the table; they follow each other.
  VITKERNELS_INLINE int64_t offset(int64_t i, int64_t y) const {
    return (y - i / width + group_height - 1) * (2 * group_width - 1) - i % width + group_width - 1;
  }
};

// Rows [begin, begin + rows) of the logits, before q k^T is added. Every line of keys overwrites what the one before
// wrote too far.
template <class T>
void start_scores(const Group<T>& group, Matrix<T> scores, int64_t begin, int64_t rows) {
  int64_t tokens = group.tokens(), columns = padded<T>(tokens);
  for (int64_t i = 0; i < rows; i++) {
    T* row = scores.row(i);
    if (group.bias) {
      const T* line = group.bias + group.offset(begin + i, 0);
      for (int64_t y = 0; y < tokens; y += group.width, line += 2 * group.group_width - 1)
        for (int64_t x = 0; x < group.width; x += LANES<T>) store(row + y + x, load(line + x));
    } else {
      for (int64_t j = 0; j < columns; j += LANES<T>) store(row + j, Vec<T>{});
    }
    if (group.sides) {
      const T* apart = group.apart[group.sides[begin + i]];
      for (int64_t j = 0; j < columns; j += LANES<T>) store(row + j, load(row + j) + load(apart + j));
    }
    store(row + tokens, broadcast(T(-__builtin_inf())));
  }
}

// The gradient of the table gains rows [begin, begin + rows) of the logits' gradient.
template <class T>
void add_to_table(const Group<T>& group, Matrix<T> dscores, int64_t begin, int64_t rows, T* dbias) {
  for (int64_t i = 0; i < rows; i++) {
    const T* row = dscores.row(i);
    for (int64_t y = 0; y < group.height; y++, row += group.width) {
      T* line = dbias + group.offset(begin + i, y);
      for (int64_t x = 0; x < group.width; x++) line[x] += row[x];
    }
  }
}

}  // namespace vitkernels::VITKERNELS_LEVEL
