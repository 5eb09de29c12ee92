// Random numbers, and memory for the tests of the kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

using std::int64_t;

inline std::mt19937_64 engine(1);

inline int64_t pick(int64_t n) {
  return static_cast<int64_t>(engine() % static_cast<std::uint64_t>(n));
}

// From and to a storage type; the one of 2 bytes is BFloat16.
template <class S>
double value(S x) {
  if constexpr (sizeof(S) == 2) {
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
  if constexpr (sizeof(S) == 2) {
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
