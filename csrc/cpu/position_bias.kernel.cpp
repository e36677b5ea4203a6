// The MLP of the dynamic position bias over a range of offsets, forward and backward. Compiled once per vector level.
#include "position_bias.h"

#include <cmath>

#include "attention.h"
#include "workspace.h"

namespace vitkernels::VITKERNELS_LEVEL {
namespace {

constexpr double EPS = 1e-5;
constexpr int64_t BLOCK = 64;  // offsets at a time

// LayerNorm, ReLU and Linear from p values to `out`. Rows are padded to full vectors, with zeros throughout.
template <class T>
struct Layer {
  int64_t out;
  T *norm_weight, *norm_bias, *bias;
  Matrix<T> weight, transposed;  // [out, p], [p, out]
  T *dnorm_weight, *dnorm_bias, *dbias;
  Matrix<T> dweight;  // [out, p]
};

template <class T>
class Worker {
 public:
  Worker(const PositionBias& problem, bool backward) : p_(problem), width_(padded<T>(problem.hidden)) {
    memory_.allocate([&] { lay_out(backward); });
    load_parameters();
  }

  void forward(int64_t begin, int64_t rows, T* table) {
    project(begin, rows);
    for (int l = 0; l < 3; l++) apply(layers_[l], z_[l], l < 2 ? z_[l + 1] : out_, rows, l < 2 && p_.residual);
    for (int64_t h = 0; h < p_.heads; h++)
      for (int64_t i = 0; i < rows; i++) table[h * p_.offsets() + begin + i] = out_.row(i)[h];
  }

  void backward(int64_t begin, int64_t rows, const T* dtable) {
    project(begin, rows);
    for (int l = 0; l < 2; l++) apply(layers_[l], z_[l], z_[l + 1], rows, p_.residual);
    for (int64_t h = 0; h < p_.heads; h++)
      for (int64_t i = 0; i < rows; i++) out_.row(i)[h] = dtable[h * p_.offsets() + begin + i];
    apply_backward(layers_[2], z_[2], out_, dz_[2], rows, false);
    apply_backward(layers_[1], z_[1], dz_[2], dz_[1], rows, p_.residual);
    apply_backward(layers_[0], z_[0], dz_[1], dz_[0], rows, p_.residual);
    project_backward(begin, rows);
  }

  void store_gradients(T* to) const {
    for (int64_t i = 0; i < p_.hidden; i++) *to++ = dproject_y_[i], *to++ = dproject_x_[i];
    to = store_row(to, dproject_bias_, p_.hidden);
    for (const Layer<T>& layer : layers_) {
      to = store_row(to, layer.dnorm_weight, p_.hidden);
      to = store_row(to, layer.dnorm_bias, p_.hidden);
      for (int64_t i = 0; i < layer.out; i++) to = store_row(to, layer.dweight.row(i), p_.hidden);
      to = store_row(to, layer.dbias, layer.out);
    }
  }

 private:
  Matrix<T> take(int64_t rows, int64_t columns) { return memory_.take<T>(rows, padded<T>(columns)); }
  T* take(int64_t size) { return take(1, size).data; }

  void lay_out(bool backward) {
    int64_t p = p_.hidden;
    for (T** row : {&project_y_, &project_x_, &project_bias_, &inside_}) *row = take(p);
    for (Layer<T>& layer : layers_) {
      layer.out = &layer == &layers_[2] ? p_.heads : p;
      layer.norm_weight = take(p), layer.norm_bias = take(p), layer.bias = take(layer.out);
      layer.weight = take(padded<T>(layer.out), p), layer.transposed = take(width_, layer.out);
      if (!backward) continue;
      layer.dnorm_weight = take(p), layer.dnorm_bias = take(p), layer.dbias = take(layer.out);
      layer.dweight = take(layer.out, p);
    }
    for (Matrix<T>* rows : {&z_[0], &z_[1], &z_[2], &normal_, &hidden_}) *rows = take(BLOCK, p);
    out_ = take(BLOCK, p_.heads);
    rstd_ = take(BLOCK);
    if (!backward) return;
    for (Matrix<T>* rows : {&dz_[0], &dz_[1], &dz_[2], &product_}) *rows = take(BLOCK, p);
    for (T** row : {&dproject_y_, &dproject_x_, &dproject_bias_}) *row = take(p);
  }

  const T* parameter(int i) const { return (const T*)p_.parameters[i]; }

  void load_parameters() {
    int64_t p = p_.hidden;
    for (int64_t i = 0; i < p; i++) {
      project_y_[i] = parameter(0)[2 * i], project_x_[i] = parameter(0)[2 * i + 1];
      inside_[i] = 1;
    }
    std::memcpy(project_bias_, parameter(1), p * sizeof(T));
    for (int l = 0; l < 3; l++) {
      Layer<T>& layer = layers_[l];
      int first = 2 + 4 * l;
      std::memcpy(layer.norm_weight, parameter(first), p * sizeof(T));
      std::memcpy(layer.norm_bias, parameter(first + 1), p * sizeof(T));
      for (int64_t i = 0; i < layer.out; i++)
        std::memcpy(layer.weight.row(i), parameter(first + 2) + i * p, p * sizeof(T));
      std::memcpy(layer.bias, parameter(first + 3), layer.out * sizeof(T));
      transpose_into<T>(layer.transposed, layer.weight, layer.out, p);
    }
  }

  // The offset of a row of the table, query minus key.
  T offset_y(int64_t row) const { return T(row / (2 * p_.group_w - 1) - p_.group_h + 1); }
  T offset_x(int64_t row) const { return T(row % (2 * p_.group_w - 1) - p_.group_w + 1); }

  void project(int64_t begin, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      T y = offset_y(begin + i), x = offset_x(begin + i);
      for (int64_t j = 0; j < width_; j += LANES<T>)
        store(z_[0].row(i) + j, y * load(project_y_ + j) + x * load(project_x_ + j) + load(project_bias_ + j));
    }
  }

  void project_backward(int64_t begin, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      T y = offset_y(begin + i), x = offset_x(begin + i);
      for (int64_t j = 0; j < width_; j += LANES<T>) {
        Vec<T> dz = load(dz_[0].row(i) + j);
        store(hidden_.row(i) + j, y * dz);
        store(normal_.row(i) + j, x * dz);
      }
    }
    add_rows(dproject_y_, hidden_, rows);
    add_rows(dproject_x_, normal_, rows);
    add_rows(dproject_bias_, dz_[0], rows);
  }

  // to += the sum of the rows, by runs, so that rounding errors do not add up along all of them.
  static void add_rows(T* to, Matrix<T> from, int64_t rows) {
    constexpr int64_t RUN = 8;
    for (int64_t j = 0; j < from.stride; j += LANES<T>) {
      Vec<T> sum{};
      for (int64_t begin = 0; begin < rows; begin += RUN) {
        Vec<T> run{};
        for (int64_t i = begin; i < rows && i < begin + RUN; i++) run += load(from.row(i) + j);
        sum += run;
      }
      store(to + j, load(to + j) + sum);
    }
  }

  // normal_ = (z - mean) * rstd_, hidden_ = ReLU of its affine image.
  void normalise(const Layer<T>& layer, Matrix<T> z, int64_t rows) {
    T share = T(1) / T(p_.hidden);
    for (int64_t i = 0; i < rows; i++) {
      const T* row = z.row(i);
      Vec<T> sum{}, squares{}, zero{};
      for (int64_t j = 0; j < width_; j += LANES<T>) sum += load(row + j);
      Vec<T> mean = sum_of<T>(sum) * share;
      for (int64_t j = 0; j < width_; j += LANES<T>) {
        Vec<T> centred = (load(row + j) - mean) * load(inside_ + j);
        squares += centred * centred;
      }
      rstd_[i] = T(1) / std::sqrt(sum_of<T>(squares)[0] * share + T(EPS));
      for (int64_t j = 0; j < width_; j += LANES<T>) {
        Vec<T> normal = (load(row + j) - mean) * load(inside_ + j) * rstd_[i];
        store(normal_.row(i) + j, normal);
        store(hidden_.row(i) + j, max<T>(normal * load(layer.norm_weight + j) + load(layer.norm_bias + j), zero));
      }
    }
  }

  void apply(const Layer<T>& layer, Matrix<T> z, Matrix<T> out, int64_t rows, bool residual) {
    normalise(layer, z, rows);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < out.stride; j += LANES<T>) {
        Vec<T> start = load(layer.bias + j);
        store(out.row(i) + j, residual ? start + load(z.row(i) + j) : start);
      }
    multiply<T>(hidden_, layer.transposed, out, rows, p_.hidden, out.stride, true);
  }

  // dz from dout; the layer's gradients gain this block's. hidden_ becomes the gradient of what ReLU was given.
  void apply_backward(Layer<T>& layer, Matrix<T> z, Matrix<T> dout, Matrix<T> dz, int64_t rows, bool residual) {
    normalise(layer, z, rows);
    multiply<T, true>(dout, hidden_, layer.dweight, layer.out, rows, width_, true);
    multiply<T>(dout, layer.weight, dz, rows, layer.out, width_);
    add_rows(layer.dbias, dout, rows);
    T share = T(1) / T(p_.hidden);
    for (int64_t i = 0; i < rows; i++) {
      Vec<T> sum{}, product{}, zero{};
      for (int64_t j = 0; j < width_; j += LANES<T>) {
        Vec<T> normal = load(normal_.row(i) + j);
        Vec<T> daffine = load(hidden_.row(i) + j) > zero ? load(dz.row(i) + j) : zero;
        store(hidden_.row(i) + j, daffine);
        store(product_.row(i) + j, daffine * normal);
        Vec<T> dnormal = daffine * load(layer.norm_weight + j);
        store(dz.row(i) + j, dnormal);
        sum += dnormal;
        product += dnormal * normal;
      }
      sum = sum_of<T>(sum) * share, product = sum_of<T>(product) * share;
      for (int64_t j = 0; j < width_; j += LANES<T>) {
        Vec<T> normal = load(normal_.row(i) + j), inside = load(inside_ + j);
        Vec<T> value = (load(dz.row(i) + j) - sum * inside - normal * product) * rstd_[i];
        store(dz.row(i) + j, residual ? value + load(dout.row(i) + j) : value);
      }
    }
    add_rows(layer.dnorm_weight, product_, rows);
    add_rows(layer.dnorm_bias, hidden_, rows);
  }

  static T* store_row(T* to, const T* from, int64_t n) {
    std::memcpy(to, from, n * sizeof(T));
    return to + n;
  }

  const PositionBias& p_;
  int64_t width_;  // p, padded
  Workspace memory_;
  T *project_y_, *project_x_, *project_bias_, *dproject_y_, *dproject_x_, *dproject_bias_;
  T* inside_;  // 1 for each of the p values, 0 for the padding
  Layer<T> layers_[3];
  Matrix<T> z_[3], dz_[3], normal_, hidden_, product_, out_;  // out_: [BLOCK, heads], dtable's rows in backward
  T* rstd_;
};

template <class Visit>
void for_blocks(int64_t begin, int64_t end, Visit visit) {
  for (; begin < end; begin += BLOCK) visit(begin, end - begin < BLOCK ? end - begin : BLOCK);
}

template <class T>
void forward(const PositionBias& problem, int64_t begin, int64_t end, void* table) {
  Worker<T> worker(problem, false);
  for_blocks(begin, end, [&](int64_t first, int64_t rows) { worker.forward(first, rows, (T*)table); });
}

template <class T>
void backward(const PositionBias& problem, int64_t begin, int64_t end, const void* dtable, void* gradients) {
  Worker<T> worker(problem, true);
  for_blocks(begin, end, [&](int64_t first, int64_t rows) { worker.backward(first, rows, (const T*)dtable); });
  worker.store_gradients((T*)gradients);
}

}  // namespace

PositionBiasKernels position_bias_kernels() {
  return {{forward<float>, forward<double>}, {backward<float>, backward<double>}};
}

}  // namespace vitkernels::VITKERNELS_LEVEL
