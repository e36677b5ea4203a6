// Small matrix products in registers, and transposition, for the kernels of every operator.
#pragma once

#include "vec.h"

namespace vitkernels::VITKERNELS_LEVEL {

VITKERNELS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
VITKERNELS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first of the fewest like parts of n that have at most `most`.
VITKERNELS_INLINE int64_t share_of(int64_t n, int64_t most) { return ceil_div(n, ceil_div(n, most)); }

template <class T>
VITKERNELS_INLINE int64_t padded(int64_t n) {
  return ceil_div(n, LANES<T>) * LANES<T>;
}

// What is done between the tiles of a product where there is nothing to do.
struct Nothing {
  VITKERNELS_INLINE void operator()() const {}
};

// A register tile of a product: ROWS x VECTORS accumulators, one vector register each, beside VECTORS of B and a
// broadcast. 32 registers hold 24 accumulators, 16 hold 12.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MAX_VECTORS = 4, MAX_ACCUMULATORS = 24;
#else
constexpr int MAX_VECTORS = 2, MAX_ACCUMULATORS = 12;
#endif
constexpr int MAX_ROWS = 8;

constexpr int tile_rows(int vectors) {
  return MAX_ACCUMULATORS / vectors < MAX_ROWS ? MAX_ACCUMULATORS / vectors : MAX_ROWS;
}

// A row-major matrix. No data stands for zeros where a product starts.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;

  VITKERNELS_INLINE T* row(int64_t i) const { return data + i * stride; }
  VITKERNELS_INLINE Matrix at(int64_t i, int64_t j) const { return {data ? row(i) + j : nullptr, stride}; }
};

template <class T, bool TRANSPOSED, int ROWS, int VECTORS>
void multiply_tile(Matrix<T> a, Matrix<T> b, Matrix<T> c, int64_t depth, Matrix<T> start) {
  Vec<T> sum[ROWS][VECTORS] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    Vec<T> right[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; j++) right[j] = load(b.row(k) + j * LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      Vec<T> left = broadcast(TRANSPOSED ? a.row(k)[i] : a.row(i)[k]);
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; j++) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; j++) {
      if (start.data) sum[i][j] += load(start.row(i) + j * LANES<T>);
      store(c.row(i) + j * LANES<T>, sum[i][j]);
    }
}

// The tile with as many rows as are left.
template <class T, bool TRANSPOSED, int VECTORS, int ROWS = tile_rows(VECTORS)>
VITKERNELS_INLINE void multiply_rows(int64_t rows, Matrix<T> a, Matrix<T> b, Matrix<T> c, int64_t depth,
                                     Matrix<T> start) {
  if (rows >= ROWS) return multiply_tile<T, TRANSPOSED, ROWS, VECTORS>(a, b, c, depth, start);
  if constexpr (ROWS > 1) multiply_rows<T, TRANSPOSED, VECTORS, ROWS - 1>(rows, a, b, c, depth, start);
}

template <class T, bool TRANSPOSED, int VECTORS = MAX_VECTORS, class Between>
VITKERNELS_INLINE void multiply_columns(int64_t vectors, int64_t rows, Matrix<T> a, Matrix<T> b, Matrix<T> c,
                                        int64_t depth, Matrix<T> start, Between& between) {
  if constexpr (VECTORS > 1) {
    if (vectors < VECTORS)
      return multiply_columns<T, TRANSPOSED, VECTORS - 1>(vectors, rows, a, b, c, depth, start, between);
  }
  for (int64_t i = 0, tile; i < rows; i += tile) {
    tile = share_of(rows - i, tile_rows(VECTORS));
    Matrix<T> left = TRANSPOSED ? a.at(0, i) : a.at(i, 0);
    multiply_rows<T, TRANSPOSED, VECTORS>(tile, left, b, c.at(i, 0), depth, start.at(i, 0));
    between();
  }
}

// c = start + a b. c: [rows, columns], a: [rows, depth], or [depth, rows] if TRANSPOSED, b: [depth, columns]; columns
// padded. A long product is summed in blocks, so that its rounding error grows with the number of blocks.
template <class T, bool TRANSPOSED = false, class Between = Nothing>
void multiply(Matrix<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t depth, int64_t columns, Matrix<T> start,
              Between&& between = {}) {
  constexpr int64_t BLOCK = 256;
  for (; depth > BLOCK; depth -= BLOCK, start = c) {
    multiply<T, TRANSPOSED>(a, b, c, rows, BLOCK, columns, start, between);
    a = TRANSPOSED ? a.at(BLOCK, 0) : a.at(0, BLOCK);
    b = b.at(BLOCK, 0);
  }
  int64_t vectors = ceil_div(columns, LANES<T>);
  for (int64_t j = 0, tile; j < vectors; j += tile) {
    tile = share_of(vectors - j, MAX_VECTORS);
    int64_t x = j * LANES<T>;
    multiply_columns<T, TRANSPOSED>(tile, rows, a, b.at(0, x), c.at(0, x), depth, start.at(0, x), between);
  }
}

// c = a b, or c += a b.
template <class T, bool TRANSPOSED = false, class Between = Nothing>
void multiply(Matrix<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t depth, int64_t columns, bool add = false,
              Between&& between = {}) {
  multiply<T, TRANSPOSED>(a, b, c, rows, depth, columns, add ? c : Matrix<T>{nullptr, 0}, between);
}

// to = from^T; from: [rows, columns] in buffers padded to full vectors both ways.
template <class T>
void transpose_into(Matrix<T> to, Matrix<T> from, int64_t rows, int64_t columns) {
  constexpr int L = LANES<T>;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) block[l] = load(from.row(i + l) + j);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) store(to.row(j + l) + i, block[l]);
    }
}

}  // namespace vitkernels::VITKERNELS_LEVEL
