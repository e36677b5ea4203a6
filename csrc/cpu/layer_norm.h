// LayerNorm, forward and backward, of rows in local buffers.
#pragma once

#include <cmath>

#include "matrix.h"

namespace vitkernels::VITKERNELS_LEVEL {

// Of rows that are padded with zeros, ROWS at a time, since one row is a chain of dependent steps.
template <class T>
class LayerNorm {
 public:
  static constexpr int MAX_ROWS = 4;

  LayerNorm(int64_t head_dim, const T* weight, const T* bias, double eps)
      : head_dim_(head_dim), last_(padded<T>(head_dim) - LANES<T>), weight_(weight), bias_(bias), eps_(T(eps)) {
    for (int l = 0; l < LANES<T>; l++) inside_[l] = last_ + l < head_dim;
  }

  // Uses up the rows.
  template <int ROWS, class S>
  void forward(Matrix<T> rows, S* out, int64_t stride) const {
    T rstd[ROWS];
    centre<ROWS>(rows, rstd);
    auto normalise = [&](int64_t d, auto to) {
      Vec<T> weight = load(weight_ + d), bias = load(bias_ + d);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) store(to(i) + d, load(rows.row(i) + d) * rstd[i] * weight + bias);
    };
    if (head_dim_ >= LANES<T>)
      return for_vectors<T>(head_dim_, [&](int64_t d) { normalise(d, [&](int i) { return out + i * stride; }); });
    normalise(0, [&](int i) { return rows.row(i); });
    for (int i = 0; i < ROWS; i++) copy_row(out + i * stride, rows.row(i), head_dim_, T(1));
  }

  // to = the gradient of the rows, which are used up, for that of their norm. dweight and dbias are added to.
  template <int ROWS>
  void backward(Matrix<T> rows, Matrix<T> dout, Matrix<T> to, T* dweight, T* dbias) const {
    T rstd[ROWS];
    centre<ROWS>(rows, rstd);
    Vec<T> mean[ROWS] = {}, slope[ROWS] = {};  // of dnormal = dout * weight, along the normal
    for (int64_t d = 0; d <= last_; d += LANES<T>) {
      Vec<T> weight = load(weight_ + d);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        Vec<T> dnormal = load(dout.row(i) + d) * weight;
        mean[i] += dnormal;
        slope[i] += dnormal * load(rows.row(i) + d);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      mean[i] = sum_of<T>(mean[i]) * share();
      slope[i] = sum_of<T>(slope[i]) * (share() * rstd[i] * rstd[i]);
    }
    for (int64_t d = 0; d <= last_; d += LANES<T>) {
      Vec<T> weight = load(weight_ + d), sum{}, product{};
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        Vec<T> centred = load(rows.row(i) + d), given = load(dout.row(i) + d);
        sum += given;
        product += given * (centred * rstd[i]);
        store(to.row(i) + d, ((given * weight - mean[i]) - centred * slope[i]) * rstd[i]);
      }
      store(dweight + d, load(dweight + d) + product);
      store(dbias + d, load(dbias + d) + sum);
    }
  }

 private:
  VITKERNELS_INLINE T share() const { return T(1) / T(head_dim_); }

  // The rows lose their mean.
  template <int ROWS>
  VITKERNELS_INLINE void centre(Matrix<T> rows, T* rstd) const {
    Vec<T> mean[ROWS] = {}, squares[ROWS] = {};
    for (int64_t d = 0; d <= last_; d += LANES<T>)
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) mean[i] += load(rows.row(i) + d);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) mean[i] = sum_of<T>(mean[i]) * share();
    auto subtract = [&](int64_t d, Vec<T> inside) {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        Vec<T> centred = (load(rows.row(i) + d) - mean[i]) * inside;
        squares[i] += centred * centred;
        store(rows.row(i) + d, centred);
      }
    };
    for (int64_t d = 0; d < last_; d += LANES<T>) subtract(d, broadcast(T(1)));
    subtract(last_, load(inside_));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) rstd[i] = 1 / std::sqrt(sum_of<T>(squares[i])[0] * share() + eps_);
  }

  const int64_t head_dim_, last_;  // the last vector's place
  const T *weight_, *bias_;
  const T eps_;
  T inside_[LANES<T>];  // of the last vector: 1, and 0 for the padding
};

}  // namespace vitkernels::VITKERNELS_LEVEL
