// Vectors by the compiler's vector extensions: one source for every processor, included only by files that are compiled
// once per vector level, all of it in that level's namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "inline.h"

#if defined(__AVX512F__)
#define VITKERNELS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VITKERNELS_VECTOR_BYTES 32
#else
#define VITKERNELS_VECTOR_BYTES 16
#endif

namespace vitkernels::VITKERNELS_LEVEL {

template <class T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};

constexpr double LN2 = 0.693147180559945309417;

// The floating format of a lane. LN2_HIGH has so few bits that its products with exponents are exact; LN2_LOW is the
// rest of ln 2.
template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = int32_t;
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float LN2_HIGH = 0x1.62ep-1f, LN2_LOW = float(LN2 - LN2_HIGH);
};
template <>
struct Lane<double> {
  using Int = int64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double LN2_HIGH = 0x1.62e42fefap-1, LN2_LOW = 0x1.cf79abc9e3b3ap-40;
};

template <class T>
constexpr int LANES = VITKERNELS_VECTOR_BYTES / sizeof(T);
template <class T>
using Vec = typename VectorOf<T, VITKERNELS_VECTOR_BYTES>::type;
template <class T>
using IntVec = Vec<typename Lane<T>::Int>;

// Tensor elements that are stored in 16 bits and computed with in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class S>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <class S>
using Accumulation = typename AccumulationOf<S>::type;

template <class V>
VITKERNELS_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

VITKERNELS_INLINE Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
VITKERNELS_INLINE Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
VITKERNELS_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
VITKERNELS_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }

template <class T>
VITKERNELS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

VITKERNELS_INLINE Vec<float> as_float(Vec<int32_t> bits) { return (Vec<float>)bits; }
VITKERNELS_INLINE Vec<int32_t> as_bits(Vec<float> x) { return (Vec<int32_t>)x; }

using Bits16 = VectorOf<uint16_t, VITKERNELS_VECTOR_BYTES / 2>::type;

VITKERNELS_INLINE Vec<int32_t> load_bits16(const uint16_t* p) {
  return __builtin_convertvector(load_as<Bits16>(p), Vec<int32_t>);
}

VITKERNELS_INLINE void store_bits16(uint16_t* p, Vec<int32_t> bits) {
  auto narrow = __builtin_convertvector(bits, Bits16);
  std::memcpy(p, &narrow, sizeof(narrow));
}

// bfloat16 is the upper half of a float; stored rounded to nearest even.
VITKERNELS_INLINE Vec<float> load(const BFloat16* p) { return as_float(load_bits16(&p->bits) << 16); }

VITKERNELS_INLINE void store(BFloat16* p, Vec<float> x) {
  Vec<int32_t> bits = as_bits(x);
  Vec<int32_t> rounded = bits + 0x7fff + ((bits >> 16) & 1);
  store_bits16(&p->bits, (x == x ? rounded : bits | 0x400000) >> 16 & 0xffff);
}

// fp16 has 5 exponent bits, of bias 15; a product with 2^112 changes the bias and makes subnormal numbers normal.
VITKERNELS_INLINE Vec<float> load(const Half* p) {
  Vec<int32_t> bits = load_bits16(&p->bits), magnitude = bits & 0x7fff;
  Vec<int32_t> finite = as_bits(as_float(magnitude << 13) * 0x1p112f), special = (magnitude << 13) | 0x7f800000;
  return as_float((magnitude >= 0x7c00 ? special : finite) | (bits & 0x8000) << 16);
}

VITKERNELS_INLINE void store(Half* p, Vec<float> x) {
  Vec<int32_t> bits = as_bits(x), magnitude = bits & 0x7fffffff;
  Vec<int32_t> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Vec<int32_t> subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds at 2^-24
  Vec<int32_t> half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 + Vec<int32_t>{} : half;
  half = magnitude > 0x7f800000 ? 0x7e00 + Vec<int32_t>{} : half;
  store_bits16(&p->bits, half | (bits >> 16 & 0x8000));
}

// visit(d) for every full vector of [0, n), the last one moved back so that it ends at n. n >= LANES.
template <class T, class Visit>
VITKERNELS_INLINE void for_vectors(int64_t n, Visit visit) {
  int64_t d = 0;
  for (; d + LANES<T> <= n; d += LANES<T>) visit(d);
  if (d < n) visit(n - LANES<T>);
}

// to[0, n) = factor * from[0, n), each element converted; reads and writes nothing else.
template <class To, class From, class T>
VITKERNELS_INLINE void copy_row(To* to, const From* from, int64_t n, T factor) {
  if (n >= LANES<T>) return for_vectors<T>(n, [&](int64_t d) { store(to + d, load(from + d) * factor); });
  From source[LANES<T>] = {};
  To target[LANES<T>];
  std::memcpy(source, from, n * sizeof(From));
  store(target, load(source) * factor);
  std::memcpy(to, target, n * sizeof(To));
}

// The larger; b where either is NaN.
template <class T>
VITKERNELS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T, int... I>
VITKERNELS_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IntVec<T>{I...});
#endif
}

// Lane l: of `a` where bit STEP of l is HIGH, of `b` STEP lanes away elsewhere; the exchange of a blockwise
// transposition.
template <class T, int STEP, bool HIGH, int... L>
VITKERNELS_INLINE Vec<T> exchange(Vec<T> a, Vec<T> b, std::integer_sequence<int, L...>) {
  constexpr int N = LANES<T>;
  if constexpr (HIGH) return shuffle<T>(a, b, std::integer_sequence<int, (L & STEP ? N + L : L + STEP)...>());
  return shuffle<T>(a, b, std::integer_sequence<int, (L & STEP ? N + L - STEP : L)...>());
}

// v becomes its transpose, LANES x LANES.
template <class T, int STEP = LANES<T> / 2>
VITKERNELS_INLINE void transpose(Vec<T>* v) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES<T>>();
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; i++) {
    if (i & STEP) continue;
    Vec<T> a = v[i], b = v[i + STEP];
    v[i] = exchange<T, STEP, false>(a, b, lanes);
    v[i + STEP] = exchange<T, STEP, true>(a, b, lanes);
  }
  if constexpr (STEP > 1) transpose<T, STEP / 2>(v);
}

// Every lane holds the reduction of all lanes.
template <class T, int STEP = LANES<T> / 2, class Combine, int... L>
VITKERNELS_INLINE Vec<T> reduce(Vec<T> v, Combine combine, std::integer_sequence<int, L...> lanes) {
  v = combine(v, shuffle<T>(v, v, std::integer_sequence<int, (L ^ STEP)...>()));
  if constexpr (STEP > 1) return reduce<T, STEP / 2>(v, combine, lanes);
  return v;
}

template <class T>
VITKERNELS_INLINE Vec<T> max_of(Vec<T> v) {
  return reduce<T>(v, max<T>, std::make_integer_sequence<int, LANES<T>>());
}

template <class T>
VITKERNELS_INLINE Vec<T> sum_of(Vec<T> v) {
  return reduce<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; }, std::make_integer_sequence<int, LANES<T>>());
}

// Lane l: the sum of v[l]. v, LANES vectors, is used up.
template <class T, int STEP = LANES<T> / 2>
VITKERNELS_INLINE Vec<T> sums_of(Vec<T>* v) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES<T>>();
#pragma GCC unroll 16
  for (int i = 0; i < STEP; i++)
    v[i] = exchange<T, STEP, false>(v[i], v[i + STEP], lanes) + exchange<T, STEP, true>(v[i], v[i + STEP], lanes);
  if constexpr (STEP > 1) return sums_of<T, STEP / 2>(v);
  return v[0];
}

// 1 / k!, the coefficients of e^x.
constexpr double inverse_factorial(int k) { return k == 0 ? 1 : inverse_factorial(k - 1) / k; }

template <class T, int... K>
VITKERNELS_INLINE Vec<T> series_of_exp(Vec<T> x, std::integer_sequence<int, K...>) {
  constexpr int DEGREE = sizeof...(K);
  Vec<T> sum = broadcast(T(inverse_factorial(DEGREE)));
  ((sum = sum * x + T(inverse_factorial(DEGREE - 1 - K))), ...);
  return sum;
}

// e^x = 2^n e^rest with n = round(x / ln 2): n becomes an exponent, the rest, at most ln(2) / 2, goes through the
// series. Where the result would be below the normal numbers the exponent's bits are those of 0, and so is the result.
template <class T>
VITKERNELS_INLINE Vec<T> exp(Vec<T> x) {
  using L = Lane<T>;
  constexpr int DEGREE = sizeof(T) == 4 ? 7 : 13;
  constexpr T ROUND = T(3) * (int64_t(1) << (L::MANTISSA - 1)) + L::BIAS;  // leaves n + BIAS in the low bits
  Vec<T> clamped = max<T>(broadcast(T(-L::BIAS * LN2)), x);                // NaN stays NaN
  Vec<T> rounded = clamped * T(1 / LN2) + ROUND, n = rounded - ROUND;
  Vec<T> rest = (clamped - n * L::LN2_HIGH) - n * L::LN2_LOW;
  Vec<T> power = (Vec<T>)((IntVec<T>)rounded << L::MANTISSA);
  return series_of_exp<T>(rest, std::make_integer_sequence<int, DEGREE>()) * power;
}

}  // namespace vitkernels::VITKERNELS_LEVEL
