// Vectorised tanh, sigmoid and softplus, one source for float and double. The polynomials are our
// own: bench/ladder/polynomials.py. Largest errors, and what else was tried:
// bench/ladder/activations.md.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

template <class A>
struct MathConstants;

template <>
struct MathConstants<float> {
  using Bits = std::uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kInverseLog2 = 0x1.715476p0f;
  static constexpr float kLog2High = 0x1.62e4p-1f;  // 16 bits: exact times any exponent
  static constexpr float kLog2Low = 0x1.7f7d1cp-20f;
  // Beyond it the result rounds to 1. With so few powers of two one part of ln 2 will do.
  static constexpr float kTanhLimit = 10.0f;
  static constexpr float kTanhSeam = 0.5625f;
  static constexpr float kTanhLog2High = 0x1.62e43p-1f;
  static constexpr float kTanhLog2Low = 0.0f;
  // exp of the bottom is below half of the least subnormal; beyond the top the result rounds to 1.
  static constexpr float kSigmoidBottom = -104.0f;
  static constexpr float kSigmoidTop = 18.0f;
  static constexpr int kLift = 64;
  static constexpr float kLower = 0x1p-64f;
  static constexpr float kSigmoidScale = 1.5f;
  static constexpr float kTanhNear[] = {
      -0.33333313879465202036f, 0.1333245195930986894f,     -0.05383739596598564407f,
      0.021007313887361264955f, -0.0061796007726469633011f,
  };
  static constexpr float kExpTail[] = {
      0.4999999815397110884f,    0.1666654362180036946f,    0.041667199922470474636f,
      0.0083665205264429919151f, 0.0013882516842670304814f,
  };
  static constexpr float kAtanh[] = {
      0.33333208089780884917f,
      0.20010767121380456987f,
      0.14000839089151978934f,
      0.14006333795314827849f,
  };
};

template <>
struct MathConstants<double> {
  using Bits = std::uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kInverseLog2 = 0x1.71547652b82fep0;
  static constexpr double kLog2High = 0x1.62e42fefa38p-1;  // 42 bits
  static constexpr double kLog2Low = 0x1.ef35793c7673p-45;
  static constexpr double kTanhLimit = 20.0;
  static constexpr double kTanhSeam = 0.5625;
  static constexpr double kTanhLog2High = kLog2High;
  static constexpr double kTanhLog2Low = kLog2Low;
  static constexpr double kSigmoidBottom = -746.0;
  static constexpr double kSigmoidTop = 38.0;
  static constexpr int kLift = 512;
  static constexpr double kLower = 0x1p-512;
  static constexpr double kSigmoidScale = 1.3125;
  static constexpr double kTanhNear[] = {
      -0.33333333333333277786,    0.13333333333323123851,      -0.053968253961719175851,
      0.021869488327128997876,    -0.0088632316348093165316,   0.0035920822263925953699,
      -0.0014554794918012503077,  0.00058818303989281609744,   -0.00023271469287869103372,
      0.000082358777944036815137, -0.000018902658464565870835,
  };
  static constexpr double kExpTail[] = {
      0.50000000000000000085,     0.16666666666666676507,   0.041666666666666508749,
      0.0083333333333216916518,   0.0013888888888962385109, 0.0001984126988596576839,
      0.000024801587172517582703, 2.755724437424932442e-6,  2.7557402654290011346e-7,
      2.5108978885952181978e-8,   2.0875328209992652596e-9,
  };
  static constexpr double kAtanh[] = {
      0.33333333333333154661,  0.20000000000077633139,  0.14285714274048888552,
      0.11111111977486458941,  0.090908722150695419917, 0.076932747389801351565,
      0.066505533050248261317, 0.060525327927524528883, 0.041722141464373904398,
      0.085053957492628028586,
  };
};

template <class A>
struct Math {
  using Scalar = A;
  using Vector = Vec<A>;

  // Two ways and a choice: near zero x (1 + z P(z)) with z = x^2, and 1 - 2 / (exp(2|x|) + 1),
  // which cancels there. Both add something small to what is exact, and so err by little more than
  // the last rounding; one fraction for all x is cheaper, and its RMS error is 1.7 times this one.
  RNNFAST_INLINE static Vector tanh(Vector x) {
    const Bits sign = bit_cast<Bits>(x) & kSign;
    const Vector magnitude = bit_cast<Vector>(bit_cast<Bits>(x) ^ sign);
    const Vector limit = splat(C::kTanhLimit);
    // A NaN fails this comparison, as those below, and stays.
    const Vector a = magnitude > limit ? limit : magnitude;
    const Vector z = a * a;
    const Vector near = polynomial(C::kTanhNear, z, A(1), A(1)) * (z * a) + a;
    // 2a = n ln(2) + 2r
    constexpr A kShift = shift(-1);
    const Vector shifted = a * (2 * C::kInverseLog2) + kShift;
    const Vector n = shifted - kShift;
    Vector r = a - n * (C::kTanhLog2High / 2);
    if constexpr (C::kTanhLog2Low != 0) r = r - n * (C::kTanhLog2Low / 2);
    const Vector slope = polynomial(C::kExpTail, r, A(4), A(2)) * r + A(2);
    const Vector half_sum = power_of_two(shifted) * (slope * r + A(1)) + A(0.5);
    const Vector far = A(1) - A(1) / half_sum;
    const Vector result = a <= C::kTanhSeam ? near : far;
    return bit_cast<Vector>(bit_cast<Bits>(result) | sign);
  }

  // With x = n ln(2) + r and s = 2^n: 1 / (1 + exp(-x)) = s / (s + exp(-r)).
  RNNFAST_INLINE static Vector sigmoid(Vector x) {
    const Vector bottom = splat(C::kSigmoidBottom);
    const Vector top = splat(C::kSigmoidTop);
    Vector a = x < bottom ? bottom : x;
    a = a > top ? top : a;
    // 2^n is no number for the least results: `lifted` is, and the last multiplication alone rounds
    // to a subnormal.
    constexpr A kShift = shift(C::kLift);
    const Vector shifted = a * C::kInverseLog2 + kShift;
    const Vector n = shifted - kShift;
    const Vector r = (a - n * C::kLog2High) - n * C::kLog2Low;
    const Vector lifted = power_of_two(shifted);
    // The fraction is scaled so that its denominator stays away from powers of two, above which
    // half an ulp is the largest part of a number.
    constexpr A k = C::kSigmoidScale;
    const Vector slope = polynomial(C::kExpTail, r, k, A(-1)) * r - k;
    const Vector sum = slope * r + (lifted * (C::kLower * k) + k);
    return k / sum * lifted * C::kLower;
  }

  // log(1 + exp(x)) = max(x, 0) + log(1 + z) with z = exp(-|x|) = 2^n exp(r), and with
  // s = z / (2 + z) log(1 + z) = 2 atanh(s) = z - s (z - 2 s^2 P(s^2)): z, the largest part, is
  // added last.
  RNNFAST_INLINE static Vector softplus(Vector x) {
    const Vector bottom = splat(C::kSigmoidBottom);
    const Vector zero = {};
    const Vector below = bit_cast<Vector>(bit_cast<Bits>(x) | kSign);
    const Vector a = below < bottom ? bottom : below;
    constexpr A kShift = shift(C::kLift);  // as in sigmoid: 2^n is no number for the least results
    const Vector shifted = a * C::kInverseLog2 + kShift;
    const Vector n = shifted - kShift;
    const Vector r = (a - n * C::kLog2High) - n * C::kLog2Low;
    const Vector tail = (polynomial(C::kExpTail, r, A(1), A(1)) * r) * r + r;
    const Vector z = (tail + A(1)) * power_of_two(shifted) * C::kLower;
    const Vector s = z / (z + A(2));
    const Vector w = s * s;
    const Vector rest = z - polynomial(C::kAtanh, w, A(2), A(1)) * w;
    return (x < zero ? zero : x) + (z - s * rest);
  }

  // 1 - exp(-x) of x >= 0, exact near 0.
  RNNFAST_INLINE static Vector one_minus_exp(Vector x) {
    const Vector top = splat(C::kSigmoidTop);  // beyond it the result rounds to 1
    const Vector a = x > top ? top : x;
    constexpr A kShift = shift(0);
    const Vector shifted = a * -C::kInverseLog2 + kShift;
    const Vector n = shifted - kShift;
    const Vector r = (-a - n * C::kLog2High) - n * C::kLog2Low;
    const Vector tail = (polynomial(C::kExpTail, r, A(1), A(1)) * r) * r + r;
    const Vector scale = power_of_two(shifted);
    return (A(1) - scale) - tail * scale;
  }

 private:
  using C = MathConstants<A>;
  using Bits = Vec<typename C::Bits>;
  static constexpr typename C::Bits kSign = typename C::Bits(1) << (8 * sizeof(A) - 1);

  // Adding it rounds to an integer n, and leaves the exponent field of 2^(n + lift) in the low
  // bits.
  static constexpr A shift(int lift) {
    return A(typename C::Bits(3) << (C::kMantissaBits - 1)) + A(C::kBias + lift);
  }
  RNNFAST_INLINE static Vector power_of_two(Vector shifted) {
    return bit_cast<Vector>(bit_cast<Bits>(shifted) << C::kMantissaBits);
  }

  // scale * P(ratio * x). Coefficients, lowest first, are scaled when it is compiled.
  template <int kTerms>
  RNNFAST_INLINE static Vector polynomial(const A (&coefficients)[kTerms], Vector x, A scale,
                                          A ratio) {
    A power[kTerms] = {scale};
    for (int i = 1; i < kTerms; ++i) power[i] = power[i - 1] * ratio;
    Vector sum = splat(coefficients[kTerms - 1] * power[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) sum = sum * x + coefficients[i] * power[i];
    return sum;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
