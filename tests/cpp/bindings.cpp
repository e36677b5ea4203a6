// The headers of csrc for tests/test_native.py. Compiled by the test, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "partition.h"
#include "tree.h"

namespace py = pybind11;
using namespace vitkernels;
using namespace vitkernels::VITKERNELS_LEVEL;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Pair = std::pair<int64_t, int64_t>;

// Raster index of every token of every group, [groups, N], -1 outside the map; and whether the shift wrapped it,
// [groups, N, 2].
std::pair<Array<int64_t>, Array<bool>> index_map(Pair size, Pair group, Pair interval, Pair shift) {
  Map map{{size.first, group.first, interval.first, shift.first},
          {size.second, group.second, interval.second, shift.second}};
  Array<int64_t> out({map.groups(), group.first * group.second});
  Array<bool> wrapped({map.groups(), group.first * group.second, int64_t(2)});
  std::fill_n(out.mutable_data(), out.size(), -1);
  std::fill_n(wrapped.mutable_data(), wrapped.size(), false);
  for (int64_t id = 0; id < map.groups(); id++) {
    Place place = map.place(id);
    for (int64_t gy = 0; gy < map.y.tokens(place.region_y, place.residue_y); gy++)
      for (int64_t gx = 0; gx < map.x.tokens(place.region_x, place.residue_x); gx++) {
        int64_t y = map.y.position(place.region_y, place.residue_y, gy),
                x = map.x.position(place.region_x, place.residue_x, gx);
        int64_t token = gy * group.second + gx;
        out.mutable_at(id, token) = y * size.second + x;
        wrapped.mutable_at(id, token, 0) = map.y.wrapped(y);
        wrapped.mutable_at(id, token, 1) = map.x.wrapped(x);
      }
  }
  return {out, wrapped};
}

// First places of the nodes of every level, and N.
std::vector<std::vector<int64_t>> tree_bounds(int64_t tokens, int64_t leaf_size) {
  Tree tree = Tree::of(tokens, leaf_size);
  std::vector<std::vector<int64_t>> bounds(tree.levels + 1);
  for (int64_t level = 0; level <= tree.levels; level++)
    for (int64_t node = 0; node <= int64_t(1) << level; node++) bounds[level].push_back(tree.first(level, node));
  return bounds;
}

// A copy with its rows, and their number, padded to full vectors with zeros, and a vector's slack.
template <class T>
struct Buffer {
  int64_t rows, columns, stride;
  std::vector<T> data;

  Buffer(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), stride(padded<T>(columns)), data(padded<T>(rows) * stride + LANES<T>) {}
  explicit Buffer(const Array<T>& from) : Buffer(from.shape(0), from.shape(1)) {
    for (int64_t i = 0; i < rows; i++) std::copy_n(from.data(i, 0), columns, matrix().row(i));
  }
  Matrix<T> matrix() { return {data.data(), stride}; }
  Array<T> array() {
    Array<T> to({rows, columns});
    for (int64_t i = 0; i < rows; i++) std::copy_n(matrix().row(i), columns, to.mutable_data(i, 0));
    return to;
  }
};

template <class T>
Array<T> product(Array<T> a, Array<T> b, bool transposed) {
  Buffer<T> left(a), right(b), out(transposed ? left.columns : left.rows, right.columns);
  int64_t depth = right.rows;
  if (transposed)
    multiply<T, true>(left.matrix(), right.matrix(), out.matrix(), out.rows, depth, out.stride);
  else
    multiply<T>(left.matrix(), right.matrix(), out.matrix(), out.rows, depth, out.stride);
  return out.array();
}

template <class T>
Array<T> transposition(Array<T> a) {
  Buffer<T> from(a), to(from.columns, from.rows);
  transpose_into<T>(to.matrix(), from.matrix(), from.rows, from.columns);
  return to.array();
}

// The weights of one full group, [N, N]; bias: [2Gh-1, 2Gw-1], key minus query.
template <class T>
Array<T> weights(Array<T> q, Array<T> k, Array<T> bias, Pair size) {
  Buffer<T> queries(q), keys(k), keys_transposed(keys.columns, keys.rows), scores(keys.rows, keys.rows);
  std::vector<T> table(bias.data(), bias.data() + bias.size());
  table.resize(table.size() + LANES<T>);
  Group<T> group{size.first, size.second, size.first, size.second, table.data(), nullptr, nullptr};
  transpose_into<T>(keys_transposed.matrix(), keys.matrix(), keys.rows, keys.columns);
  start_scores<T>(group, scores.matrix(), 0, scores.rows);
  multiply<T>(queries.matrix(), keys_transposed.matrix(), scores.matrix(), scores.rows, keys.columns, scores.stride,
              true);
  softmax<T>(scores.matrix(), scores.rows, scores.stride);
  return scores.array();
}

// Of the rows of a matrix of as many rows as a vector has lanes.
template <class T>
Array<T> row_sums(Array<T> a) {
  Vec<T> sums{};
  for (int64_t j = 0; j < a.shape(1); j += LANES<T>) {
    Vec<T> rows[LANES<T>];
    for (int i = 0; i < LANES<T>; i++) rows[i] = load(a.data(i, j));
    sums += sums_of<T>(rows);
  }
  Array<T> out(LANES<T>);
  store(out.mutable_data(), sums);
  return out;
}

template <class T>
Array<T> exponential(Array<T> x) {
  std::vector<T> in(x.data(), x.data() + x.size()), out(padded<T>(x.size()));
  in.resize(out.size());
  for (size_t i = 0; i < out.size(); i += LANES<T>) store(&out[i], exp<T>(load(&in[i])));
  return Array<T>(x.size(), out.data());
}

template <class S>
Array<float> widen(Array<uint16_t> bits) {
  Array<float> out(bits.size());
  copy_row(out.mutable_data(), reinterpret_cast<const S*>(bits.data()), bits.size(), 1.0f);
  return out;
}

template <class S>
Array<uint16_t> narrow(Array<float> x) {
  Array<uint16_t> out(x.size());
  copy_row(reinterpret_cast<S*>(out.mutable_data()), x.data(), x.size(), 1.0f);
  return out;
}

PYBIND11_MODULE(bindings, m) {
  m.def("index", index_map);
  m.def("tree", tree_bounds);
  m.def("row_sums_float32", row_sums<float>);
  m.def("row_sums_float64", row_sums<double>);
  m.attr("bytes") = VITKERNELS_VECTOR_BYTES;
  m.def("product_float32", product<float>);
  m.def("product_float64", product<double>);
  m.def("transposition_float32", transposition<float>);
  m.def("transposition_float64", transposition<double>);
  m.def("weights_float32", weights<float>);
  m.def("weights_float64", weights<double>);
  m.def("exp_float32", exponential<float>);
  m.def("exp_float64", exponential<double>);
  m.def("widen_float16", widen<Half>);
  m.def("widen_bfloat16", widen<BFloat16>);
  m.def("narrow_float16", narrow<Half>);
  m.def("narrow_bfloat16", narrow<BFloat16>);
}
