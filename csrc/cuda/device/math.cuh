// The nonlinearities of cells/nonlinearity.h on a device, over all values of a lane.
#pragma once

#include "cuda/device/rt.cuh"
#include "cuda/problem.h"

namespace rnnfast::cuda {

// The arithmetic of the cells on a device. It has no tanh and sigmoid of one value: those of all
// values of a lane are below.
struct Math {
  using Scalar = float;
  using Vector = float;
};

// 1 / sqrt(x) within about one rounding: rsqrt and a step of Newton's method. 1 / sqrt(inf) is 0.
RT_DEVICE float precise_inverse_root(float x) {
  const float rough = rt::inverse_root(x);
  const float finer = rt::fma(0.5f * rough, rt::fma(-x * rough, rough, 1.0f), rough);
  return rt::at_most(rough, 0.0f, rough, finer);
}

// Calls apply(m, v) for every value of a lane.
template <int kTiles, class Apply>
RT_DEVICE void for_values(Apply apply) {
  RT_UNROLL for (int m = 0; m < kTiles; ++m) { RT_UNROLL for (int v = 0; v < 4; ++v) apply(m, v); }
}

// tanh(x) for |x| <= kNear, where 1 - 2 / (1 + exp(2 x)) cancels; the polynomial of cpu/math.h.
constexpr float kNear = 0.5625f;
RT_DEVICE float tanh_near_zero(float x) {
  const float z = x * x;
  float y = 0.021007313887361264955f + z * -0.0061796007726469633011f;
  y = 0.1333245195930986894f + z * (-0.05383736598596564407f + z * y);
  return x + x * z * (-0.33333313879465202036f + z * y);
}

// tanh.approx errs by 2^-11, which is a quarter of bfloat16's rounding.
template <int kTiles>
RT_DEVICE void apply(cells::Tanh, BFloat16, float (&n)[kTiles][4]) {
  for_values<kTiles>([&](int m, int v) { n[m][v] = rt::rough_tanh(n[m][v]); });
}

// All values go through each stage together: one after another, each would wait for its own exp.
template <class Stored, int kTiles>
RT_DEVICE void apply(cells::Tanh, Stored, float (&n)[kTiles][4]) {
  float far[kTiles][4];
  for_values<kTiles>(
      [&](int m, int v) { far[m][v] = 1.0f + rt::exp(2.0f * rt::magnitude(n[m][v])); });
  for_values<kTiles>([&](int m, int v) { far[m][v] = 1.0f - 2.0f * rt::reciprocal(far[m][v]); });
  for_values<kTiles>([&](int m, int v) {
    const float x = n[m][v];
    n[m][v] = rt::at_most(rt::magnitude(x), kNear, tanh_near_zero(x), rt::with_sign(far[m][v], x));
  });
}

// The errors of exp and reciprocal are below the rounding to 16 bits.
template <class Stored, int kTiles>
RT_DEVICE void apply(cells::Sigmoid, Stored, float (&n)[kTiles][4]) {
  for_values<kTiles>([&](int m, int v) { n[m][v] = 1.0f + rt::exp(-n[m][v]); });
  for_values<kTiles>([&](int m, int v) { n[m][v] = rt::reciprocal(n[m][v]); });
}

// In float32 they are not. Near zero (1 + tanh(x / 2)) / 2; elsewhere 1 / (1 + e) or e / (1 + e)
// with e = exp(-|x|), the reciprocal corrected by a step of Newton's method.
// bench/ladder/cuda_kernel.md has the errors of both and of the plain fraction.
template <int kTiles>
RT_DEVICE void apply(cells::Sigmoid, float, float (&n)[kTiles][4]) {
  float e[kTiles][4], far[kTiles][4];
  for_values<kTiles>([&](int m, int v) { e[m][v] = rt::exp(-rt::magnitude(n[m][v])); });
  for_values<kTiles>([&](int m, int v) { far[m][v] = rt::reciprocal(1.0f + e[m][v]); });
  for_values<kTiles>([&](int m, int v) {
    const float x = n[m][v], rough = far[m][v];
    const float y = rt::fma(rough, rt::fma(-(1.0f + e[m][v]), rough, 1.0f), rough);
    const float near = 0.5f + 0.5f * tanh_near_zero(0.5f * x);
    n[m][v] = rt::at_most(rt::magnitude(x), 2 * kNear, near, rt::at_most(x, 0.0f, e[m][v] * y, y));
  });
}

template <class Stored, int kTiles>
RT_DEVICE void apply(cells::Relu, Stored, float (&n)[kTiles][4]) {
  for_values<kTiles>([&](int m, int v) { n[m][v] = cells::Relu::value<Math>(n[m][v]); });
}

// h = f(n), in place, to be stored as Stored.
template <class Stored, int kTiles>
RT_DEVICE void activate(Nonlinearity f, float (&n)[kTiles][4]) {
  cells::with_nonlinearity(f, [&](auto function) { apply(function, Stored{}, n); });
}

// dh f'(n) from h, in place of dh.
template <int kTiles>
RT_DEVICE void differentiate(Nonlinearity f, float (&dh)[kTiles][4], const float (&h)[kTiles][4]) {
  cells::with_nonlinearity(f, [&](auto function) {
    for_values<kTiles>([&](int m, int v) {
      dh[m][v] = decltype(function)::template backward<Math>(dh[m][v], h[m][v]);
    });
  });
}

}  // namespace rnnfast::cuda
