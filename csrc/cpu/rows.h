// Passes over the values of one row: what layer norm, clipping and the record need of all units at
// once. Every sum is taken in an order that depends on the length of the row alone.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// Calls body(whole, unit) for the vectors that hold units [first, end) of `size`; whole says, when
// it is compiled, whether the vector lies within the row.
template <class A, class Body>
RNNFAST_INLINE void for_units(int64_t first, int64_t end, int64_t size, Body&& body) {
  constexpr int L = kLanes<A>;
  const int64_t whole_end = end < size / L * L ? end : size / L * L;
  int64_t unit = first;
  for (; unit < whole_end; unit += L) body(Bool<true>{}, unit);
  for (; unit < end; unit += L) body(Bool<false>{}, unit);
}

// x with lanes from `count` on set to 0.
template <class A>
RNNFAST_INLINE Vec<A> first_lanes(Vec<A> x, int64_t count) {
  for (int i = 0; i < kLanes<A>; ++i) x[i] = i < count ? x[i] : A(0);
  return x;
}

// Lane i with lane i + half, until one is left. The halves are vectors of their own: of a loop over
// lanes GCC 12 makes a store and a load for each of them.
template <class A, int kBytes, class Two>
RNNFAST_INLINE A fold_lanes(typename VectorOf<A, kBytes>::type x, Two&& two) {
  if constexpr (kBytes == 2 * sizeof(A)) {
    return two(A(x[0]), A(x[1]));
  } else if constexpr (kBytes == 16) {
    return two(two(A(x[0]), A(x[2])), two(A(x[1]), A(x[3])));
  } else {
    typename VectorOf<A, kBytes / 2>::type low, high;
    __builtin_memcpy(&low, &x, kBytes / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + kBytes / 2, kBytes / 2);
    return fold_lanes<A, kBytes / 2>(two(low, high), two);
  }
}
template <class A>
RNNFAST_INLINE A sum_lanes(Vec<A> x) {
  return fold_lanes<A, kVectorBytes>(x, [](auto a, auto b) RNNFAST_INLINE_LAMBDA { return a + b; });
}
template <class A>
RNNFAST_INLINE A largest_lane(Vec<A> x) {
  return fold_lanes<A, kVectorBytes>(
      x, [](auto a, auto b) RNNFAST_INLINE_LAMBDA { return b > a ? b : a; });
}

// sums[i] = the sum over all units of a row of what terms(whole, unit, values) puts in values[i].
template <class A, int kSums, class Terms>
RNNFAST_INLINE void sum_row(int64_t size, A (&sums)[kSums], Terms&& terms) {
  constexpr int L = kLanes<A>;
  Vec<A> total[2][kSums] = {};  // two, so that an addition need not wait for the last one
  Vec<A> values[kSums];
  int64_t unit = 0;
  for (; unit + 2 * L <= size; unit += 2 * L) {
    terms(Bool<true>{}, unit, values);
    for (int i = 0; i < kSums; ++i) total[0][i] += values[i];
    terms(Bool<true>{}, unit + L, values);
    for (int i = 0; i < kSums; ++i) total[1][i] += values[i];
  }
  if (unit + L <= size) {
    terms(Bool<true>{}, unit, values);
    for (int i = 0; i < kSums; ++i) total[0][i] += values[i];
    unit += L;
  }
  if (unit < size) {
    terms(Bool<false>{}, unit, values);
    for (int i = 0; i < kSums; ++i) total[1][i] += first_lanes<A>(values[i], size - unit);
  }
  for (int i = 0; i < kSums; ++i) sums[i] = sum_lanes<A>(total[0][i] + total[1][i]);
}

// Sums of squares in double: those of the least float are far from its least number.
template <class A>
struct Squares {
  static constexpr int kParts = static_cast<int>(sizeof(double) / sizeof(A));
  using Doubles = Vec<double>;
  using Part = typename VectorOf<A, kVectorBytes / kParts>::type;

  Doubles low = {};
  Doubles high = {};  // no array of them: GCC would keep it in memory

  RNNFAST_INLINE void add(Vec<A> x) {
    low += square<0>(x);
    if constexpr (kParts == 2) high += square<1>(x);
  }
  RNNFAST_INLINE double total() const { return sum_lanes<double>(low + high); }

 private:
  template <int kPart>
  RNNFAST_INLINE static Doubles square(Vec<A> x) {
    Part part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&x) + kPart * sizeof(part), sizeof(part));
    const Doubles wide = in_double(part);
    return wide * wide;
  }
  // GCC 12 makes five instructions of __builtin_convertvector where there is one.
  RNNFAST_INLINE static Doubles in_double(Part part) {
#if defined(RNNFAST_SIMD_AVX512)
    if constexpr (kParts == 2)
      return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)part);  // GCC 12 warns of the plain one
#elif defined(RNNFAST_SIMD_AVX2)
    if constexpr (kParts == 2) return (Doubles)_mm256_cvtps_pd((__m128)part);
#endif
    return __builtin_convertvector(part, Doubles);
  }
};

// The larger of two; NaN where either is.
RNNFAST_INLINE double larger(double a, double b) { return b > a || b != b ? b : a; }

// Knuth's exact addition: `lost` gathers what the sum has rounded away. A sum over many rows would
// err more than torch's otherwise, which is a tree.
template <class V>
RNNFAST_INLINE void add_exactly(V part, V& sum, V& lost) {
  const V total = sum + part;
  const V added = total - sum;
  lost += (sum - (total - added)) + (part - added);
  sum = total;
}
template <class V>
RNNFAST_INLINE V with_lost(V sum, V lost) {
  return lost == lost ? sum + lost : sum;  // an infinite sum has lost inf - inf
}

// Mean and 1 / sqrt(variance + eps) of a row. The mean comes in two parts, and the squares are of
// what is left without the first of them: so they err no more than the row itself does by being
// rounded, however far its mean lies from 0 (Chan, Golub and LeVeque 1983).
template <class A>
struct Moments {
  A mean;
  A rest;
  A rstd;

  // Moments of `gates` rows, taken as one.
  RNNFAST_INLINE static Moments of(const A* rows, int gates, int64_t stride, int64_t size,
                                   double eps) {
    const A count = static_cast<A>(gates * size);
    A sum = 0, sums[2] = {};
    for (int gate = 0; gate < gates; ++gate) {
      const A* const row = rows + gate * stride;
      A part[1];
      sum_row<A>(size, part, [&](auto, int64_t unit, Vec<A>* values) RNNFAST_INLINE_LAMBDA {
        values[0] = load(row + unit);
      });
      sum = gate == 0 ? part[0] : sum + part[0];
    }
    const A mean = sum / count;
    for (int gate = 0; gate < gates; ++gate) {
      const A* const row = rows + gate * stride;
      A parts[2];
      sum_row<A>(size, parts, [&](auto, int64_t unit, Vec<A>* values) RNNFAST_INLINE_LAMBDA {
        values[0] = load(row + unit) - mean;
        values[1] = values[0] * values[0];
      });
      for (int i = 0; i < 2; ++i) sums[i] = gate == 0 ? parts[i] : sums[i] + parts[i];
    }
    const A rest = sums[0] / count;
    const A variance = sums[1] / count - rest * rest;
    const double positive = variance < 0 ? 0 : static_cast<double>(variance);  // NaN stays
    return {mean, rest, static_cast<A>(1 / __builtin_sqrt(positive + eps))};
  }
  RNNFAST_INLINE Vec<A> normalize(Vec<A> a) const { return ((a - mean) - rest) * rstd; }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
