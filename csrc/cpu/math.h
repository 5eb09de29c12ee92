// Vectorised tanh and sigmoid. The polynomials are our own: bench/ladder/polynomials.py.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

template <class A>
struct Math;

template <>
struct Math<float> {
  using Scalar = float;
  using Vector = Vec<float>;

  // exp(x) for -104 <= x <= 88 as (1 + tail) * 2^exponent; the caller scales, since 2^-150 is no
  // float.
  struct Exponential {
    Vector mantissa;
    Bits32 exponent;
  };

  RNNFAST_INLINE static Exponential exponential(Vector x) {
    constexpr float kShift = 0x1.8p23f;        // adding it rounds to an integer in the low bits
    constexpr float kLog2High = 0x1.62e4p-1f;  // 16 bits: exact times any exponent
    constexpr float kLog2Low = 0x1.7f7d1cp-20f;
    const Vector shifted = x * 0x1.715476p0f + kShift;
    const Vector n = shifted - kShift;
    const Vector r = (x - n * kLog2High) - n * kLog2Low;
    Vector tail = r * 0.000197903524509f + 0.00139446486652f;
    tail = tail * r + 0.00833349700838f;
    tail = tail * r + 0.0416662950925f;
    tail = tail * r + 0.166666658694f;
    tail = tail * r + 0.500000006764f;
    return {(tail * (r * r) + r) + 1.0f,
            bit_cast<Bits32>(shifted) - bit_cast<std::uint32_t>(kShift)};
  }

  RNNFAST_INLINE static Vector power_of_two(Bits32 exponent) {
    return bit_cast<Vector>((exponent + 127u) << 23);
  }

  RNNFAST_INLINE static Vector tanh(Vector x) {
    const Bits32 sign = bit_cast<Bits32>(x) & 0x80000000u;
    const Vector magnitude = bit_cast<Vector>(bit_cast<Bits32>(x) ^ sign);
    // Near zero by x (1 + z P(z)), since 1 - 2/(e+1) would cancel there.
    const Vector z = magnitude * magnitude;
    Vector near = z * 0.00214296179742f - 0.00817739820371f;
    near = near * z + 0.0217007032191f;
    near = near * z - 0.053946763065f;
    near = near * z + 0.133332060085f;
    near = near * z - 0.333333308027f;
    near = near * (z * magnitude) + magnitude;
    // From 10 on the result is 1; a NaN fails the comparison and stays.
    const Vector ten = splat(10.0f);
    const Vector doubled = 2.0f * (magnitude > ten ? ten : magnitude);
    const Exponential e = exponential(doubled);
    const Vector far = 1.0f - 2.0f / (e.mantissa * power_of_two(e.exponent) + 1.0f);
    const Vector result = magnitude <= 0.625f ? near : far;
    return bit_cast<Vector>(bit_cast<Bits32>(result) | sign);
  }

  RNNFAST_INLINE static Vector sigmoid(Vector x) {
    const Vector magnitude = bit_cast<Vector>(bit_cast<Bits32>(x) & 0x7fffffffu);
    const Vector limit = splat(104.0f);  // exp(-104) is below half of the least subnormal
    const Exponential e = exponential(-(magnitude > limit ? limit : magnitude));
    // Two factors, so that a subnormal result is rounded once and not flushed.
    const Bits32 half = bit_cast<Bits32>(bit_cast<Vec<std::int32_t>>(e.exponent) >> 1);
    const Vector decay = e.mantissa * power_of_two(half) * power_of_two(e.exponent - half);
    const Vector one = splat(1.0f);
    const Vector sum = one + decay;
    const Vector result = (x < 0.0f ? decay : one) / sum;
    // What the addition rounded away is half of the error that is left. 1/sum is at hand: it is
    // one minus the result below zero, the result itself above.
    const Vector lost = decay - (sum - one);
    return result - result * (lost * (x < 0.0f ? one - result : result));
  }
};

template <>
struct Math<double> {
  using Scalar = double;
  using Vector = Vec<double>;

  RNNFAST_INLINE static Vector tanh(Vector x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
  }

  RNNFAST_INLINE static Vector sigmoid(Vector x) {
    for (int i = 0; i < kLanes<double>; ++i) {
      const double decay = __builtin_exp(-__builtin_fabs(x[i]));
      x[i] = (x[i] < 0 ? decay : 1) / (1 + decay);
    }
    return x;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
