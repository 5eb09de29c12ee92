// Other forms of tanh and sigmoid than csrc/cpu/math.h's: cycles and error of each, float, at
// one SIMD level. The results are in activations.md. From the repository's root:
//
//   g++ -O3 -std=c++20 -ffp-contract=fast -DRNNFAST_SIMD_AVX2 -mavx2 -mfma -mf16c
//     bench/ladder/activations.cpp -o /tmp/activations && /tmp/activations
#include <x86intrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "../../csrc/cpu/math.h"

namespace level = rnnfast::cpu::RNNFAST_LEVEL;

namespace {

template <class A>
using Vec = level::Vec<A>;
using V = Vec<float>;
using Bits = level::Bits32;
using level::bit_cast;
using level::splat;
using Chosen = level::Math<float>;
using Constants = level::MathConstants<float>;

constexpr float kInverseLog2 = 0x1.715476p0f;
constexpr float kHalfLog2 = 0x1.62e43p-2f;

// n + lift rounded to an integer, its power of two, and n.
struct Split {
  V n, power;
};
RNNFAST_INLINE Split split(V x, int lift = 0) {
  const float shift = 0x1.8p23f + 127 + static_cast<float>(lift);
  const V shifted = x * kInverseLog2 + shift;
  return {shifted - shift, bit_cast<V>(bit_cast<Bits>(shifted) << 23)};
}
RNNFAST_INLINE V clamp(V x, float low, float high) {
  const V least = splat(low), most = splat(high);
  x = x < least ? least : x;
  return x > most ? most : x;
}
RNNFAST_INLINE V magnitude(V x) { return bit_cast<V>(bit_cast<Bits>(x) & 0x7fffffffu); }
RNNFAST_INLINE V with_sign(V value, V x) {
  return bit_cast<V>(bit_cast<Bits>(value) | (bit_cast<Bits>(x) & 0x80000000u));
}
RNNFAST_INLINE V upper_clamp(V x, float high) {
  const V most = splat(high);
  return x > most ? most : x;
}

// exp(x) - 1 - x = x^2 (this), |x| <= ln(2)/2, by six terms.
RNNFAST_INLINE V six_terms(V r) {
  V tail = r * 0.000197903524509f + 0.00139446486652f;
  tail = tail * r + 0.00833349700838f;
  tail = tail * r + 0.0416662950925f;
  tail = tail * r + 0.166666658694f;
  return tail * r + 0.500000006764f;
}
// exp(2r) = 1 + 2r + 2r^2 (this), |r| <= ln(2)/4, by the five terms of math.h.
RNNFAST_INLINE V five_terms(V r) {
  const float* c = Constants::kExpTail;
  V tail = r * (16 * c[4]) + 8 * c[3];
  tail = tail * r + 4 * c[2];
  tail = tail * r + 2 * c[1];
  return tail * r + c[0];
}

// As in math.h, but with one term more in each polynomial, a later seam, and exp itself rounded.
RNNFAST_INLINE V tanh_two_branches(V x) {
  const V a = magnitude(x), z = a * a;
  V near = z * 0.00214296179742f - 0.00817739820371f;
  near = near * z + 0.0217007032191f;
  near = near * z - 0.053946763065f;
  near = near * z + 0.133332060085f;
  near = near * z - 0.333333308027f;
  near = near * (z * a) + a;
  const V t = 2.0f * upper_clamp(a, 10.0f);
  const Split s = split(t);
  const V r = (t - s.n * Constants::kLog2High) - s.n * Constants::kLog2Low;
  const V e = (six_terms(r) * (r * r) + r) + 1.0f;
  const V far = 1.0f - 2.0f / (e * s.power + 1.0f);
  return with_sign(a <= 0.625f ? near : far, x);
}

// g / (g + 1), g = (exp(2x) - 1) / 2: near 0 the denominator loses a whole ulp.
RNNFAST_INLINE V tanh_expm1(V x) {
  const V a = upper_clamp(magnitude(x), 10.0f);
  const Split s = split(2.0f * a);
  const V r = a - s.n * kHalfLog2;
  const V q = r + (r * r) * (2.0f * five_terms(r));
  const V g = s.power * q + (s.power * 0.5f - 0.5f);
  return with_sign(g / (g + 1.0f), x);
}

// ((s - 1)/2 + f) / ((s + 1)/2 - f), f = (1 - exp(-2r)) / 2: the best of one fraction for all x.
RNNFAST_INLINE V tanh_fraction(V x) {
  const V a = upper_clamp(magnitude(x), 10.0f);
  const Split s = split(2.0f * a);
  const V r = a - s.n * kHalfLog2;
  const V f = r - (r * r) * (2.0f * five_terms(-r));
  const V half = s.power * 0.5f;
  return with_sign(((half - 0.5f) + f) / ((half + 0.5f) - f), x);
}

// exp(2r) = (c + r) / (c - r), c = r coth(r): two coefficients.
RNNFAST_INLINE V tanh_coth(V x) {
  const V a = upper_clamp(magnitude(x), 10.0f);
  const Split s = split(2.0f * a);
  const V r = a - s.n * kHalfLog2, z = r * r;
  const V c = (z * -0.0221341025f + 0.333332517f) * z + 1.0f;
  const V u = s.power * 0.5f - 0.5f;
  const V e = c + r;
  return with_sign((u * e + r) / (u * e + c), x);
}

// The addition theorem of n ln(2)/2 and r; odd by itself, so that the sign needs no care.
RNNFAST_INLINE V tanh_addition(V x) {
  const V a = clamp(x, -10.0f, 10.0f);
  const Split s = split(2.0f * a);
  const V r = a - s.n * kHalfLog2, z = r * r;
  V t = z * -0.0527271496f + 0.133311840f;
  t = t * z - 0.333333227f;
  t = (t * z + 1.0f) * r;
  const V w = 1.0f - s.power, v = 1.0f + s.power;
  return (v * t - w) / (v - w * t);
}

// decay / (1 + decay) of exp(-|x|), the rounding of 1 + decay made good.
RNNFAST_INLINE V sigmoid_compensated(V x) {
  const V a = upper_clamp(magnitude(x), 104.0f);
  const Split s = split(-a, 64);
  const V r = (-a - s.n * Constants::kLog2High) - s.n * Constants::kLog2Low;
  const V decay = ((six_terms(r) * (r * r) + r) + 1.0f) * s.power * 0x1p-64f;
  const V one = splat(1.0f), sum = one + decay;
  const V result = (x < 0.0f ? decay : one) / sum;
  const V lost = decay - (sum - one);
  return result - result * (lost * (x < 0.0f ? one - result : result));
}

// exp(r) = (c + r) / (c - r), all of it times 0.8125.
RNNFAST_INLINE V sigmoid_coth(V x) {
  const V a = clamp(x, -104.0f, 18.0f);
  const Split s = split(a, 64);
  const V r = (a - s.n * Constants::kLog2High) - s.n * Constants::kLog2Low, z = r * r;
  constexpr float k = 0.8125f;
  const V c = (z * (k / 8 * -0.0221341025f) + k / 2 * 0.333332517f) * z + 2 * k;
  const V up = c + k * r, down = c - k * r;
  return up / ((s.power * 0x1p-64f) * up + down) * s.power * 0x1p-64f;
}

template <class A, class F>
double cycles(F f) {
  constexpr int kCount = 1024, kRounds = 10, L = level::kLanes<A>;
  alignas(64) static A in[kCount], out[kCount];
  for (int i = 0; i < kCount; ++i) in[i] = static_cast<A>(i * 37 % kCount) / 128 - 4;
  std::uint64_t best = ~std::uint64_t(0);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const std::uint64_t start = __rdtsc();
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kCount; i += L) level::store_raw(out + i, f(level::load_raw(in + i)));
      asm volatile("" ::: "memory");
    }
    best = std::min<std::uint64_t>(best, __rdtsc() - start);
  }
  return static_cast<double>(best) / (kRounds * kCount / L);
}

struct Error {
  double worst, rms;  // in ulp; rms for 0.1 < |x| < 3, where a network works
};
template <class F, class Exact>
Error error(F f, Exact exact) {
  constexpr int L = level::kLanes<float>;
  double worst = 0, squares = 0, count = 0;
  for (std::uint64_t bits = 0; bits < std::uint64_t(1) << 32; bits += 101 * L) {
    V x;
    for (int i = 0; i < L; ++i) x[i] = bit_cast<float>(static_cast<std::uint32_t>(bits + i * 101));
    const V y = f(x);
    for (int i = 0; i < L; ++i) {
      const double right = exact(static_cast<double>(x[i]));
      if (std::isnan(right)) continue;
      const int exponent = std::abs(right) < 0x1p-126 ? -126 : std::ilogb(right);
      const double ulps = std::abs(y[i] - right) * std::ldexp(1.0, 23 - exponent);
      worst = std::max(worst, ulps);
      if (std::abs(x[i]) < 0.1f || std::abs(x[i]) > 3.0f) continue;
      squares += ulps * ulps;
      ++count;
    }
  }
  return {worst, std::sqrt(squares / count)};
}

template <class F, class Exact>
void row(const char* name, F f, Exact exact) {
  const Error e = error(f, exact);
  std::printf("%-22s %6.2f cycles  %.2f ulp, rms %.2f\n", name, cycles<float>(f), e.worst, e.rms);
}

}  // namespace

#define RNNFAST_ROW(name, exact) row(#name, [](V x) { return name(x); }, exact)

int main() {
  const auto tanh = [](double x) { return std::tanh(x); };
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  RNNFAST_ROW(tanh_two_branches, tanh);
  RNNFAST_ROW(tanh_expm1, tanh);
  RNNFAST_ROW(tanh_fraction, tanh);
  RNNFAST_ROW(tanh_coth, tanh);
  RNNFAST_ROW(tanh_addition, tanh);
  RNNFAST_ROW(Chosen::tanh, tanh);
  RNNFAST_ROW(sigmoid_compensated, sigmoid);
  RNNFAST_ROW(sigmoid_coth, sigmoid);
  RNNFAST_ROW(Chosen::sigmoid, sigmoid);
  using Double = level::Math<double>;
  std::printf("double tanh %.2f, sigmoid %.2f cycles\n",
              cycles<double>([](Vec<double> x) { return Double::tanh(x); }),
              cycles<double>([](Vec<double> x) { return Double::sigmoid(x); }));
}
