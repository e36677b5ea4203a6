// Memory of a worker: one piece, cut into arrays that begin at cache lines.
#pragma once

#include <cstring>
#include <new>

#include "matrix.h"

namespace vitkernels::VITKERNELS_LEVEL {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory_, std::align_val_t{64}); }

  // lay_out() takes every array: a first time to learn how much there is, then for good, zeros in all of them.
  template <class LayOut>
  void allocate(LayOut lay_out) {
    lay_out();
    memory_ = (char*)::operator new(used_, std::align_val_t{64});
    std::memset(memory_, 0, used_);
    used_ = 0;
    lay_out();
  }

  template <class T>
  T* take(int64_t count) {
    T* data = (T*)(memory_ + used_);
    used_ += ceil_div(count * sizeof(T), 64) * 64;
    return data;
  }

  // No rows, no data.
  template <class T>
  Matrix<T> take(int64_t rows, int64_t stride) {
    T* data = take<T>(rows * stride);
    return {rows ? data : nullptr, stride};
  }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;  // bytes
};

}  // namespace vitkernels::VITKERNELS_LEVEL
