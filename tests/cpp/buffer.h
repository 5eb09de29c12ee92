// Random numbers, and memory for the tests of the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

using std::int64_t;

inline std::mt19937_64 engine(1);

inline int64_t pick(int64_t n) {
  return static_cast<int64_t>(engine() % static_cast<std::uint64_t>(n));
}

// A program says so of its type of 2 bytes that is IEEE's half; another one is BFloat16.
template <class S>
constexpr bool kHalf = false;

// From and to a storage type.
template <class S>
double value(S x) {
  if constexpr (kHalf<S>) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const double sign = x.bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
    return sign * std::ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
  } else if constexpr (sizeof(S) == 2) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  } else {
    return static_cast<double>(x);
  }
}

template <class S>
S stored(double x) {
  if constexpr (kHalf<S>) {  // x in half's range
    if (x == 0) return {0};
    int exponent;
    std::frexp(x, &exponent);
    const int lifted = exponent + 14 > 0 ? exponent + 14 : 0;
    const int mantissa = static_cast<int>(std::ldexp(std::fabs(x), 25 - (lifted > 0 ? lifted : 1)));
    return {static_cast<std::uint16_t>((std::signbit(x) ? 0x8000 : 0) | lifted << 10 |
                                       (mantissa & 1023))};
  } else if constexpr (sizeof(S) == 2) {
    const float narrow = static_cast<float>(x);
    std::uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    return {static_cast<std::uint16_t>(bits >> 16)};
  } else {
    return static_cast<S>(x);
  }
}

// Exactly as long as asked, so that the address sanitizer sees one element too far.
template <class S>
struct Buffer {
  std::unique_ptr<S[]> data;
  int64_t size;

  explicit Buffer(int64_t n) : data(new S[static_cast<size_t>(n)]), size(n) { poison(); }
  static Buffer random(int64_t n, double scale) {
    Buffer buffer(n);
    std::uniform_real_distribution<double> uniform(-scale, scale);
    for (int64_t i = 0; i < n; ++i) buffer.data[i] = stored<S>(uniform(engine));
    return buffer;
  }
  S* get() { return data.get(); }
  double at(int64_t i) const { return value(data[i]); }
  size_t bytes() const { return static_cast<size_t>(size) * sizeof(S); }
  void poison() { std::memset(static_cast<void*>(data.get()), 0xff, bytes()); }  // NaN
};
