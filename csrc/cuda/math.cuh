// f and its derivative on a device, over the values of a lane.
#pragma once

#include "problem.h"
#include "rt.cuh"

namespace rnnfast::cuda {

// Math of the cells on a device, but for tanh.
struct Math {
  using Scalar = float;
  using Vector = float;

  RT_DEVICE static float sigmoid(float x) { return rt::reciprocal(1.0f + rt::exp(-x)); }
};

// What bfloat16 has digits for: it adds 2^-11 to the 2^-9 of its rounding.
template <int kTiles>
RT_DEVICE void tanh(BFloat16, float (&n)[kTiles][4]) {
  RT_UNROLL for (int m = 0; m < kTiles; ++m) {
    RT_UNROLL for (int v = 0; v < 4; ++v) n[m][v] = rt::rough_tanh(n[m][v]);
  }
}

// tanh of all values, one stage after another: value by value each would wait for its own.
// Two ways and a choice, as on the CPU (cpu/math.h): near zero the fraction cancels.
template <class Stored, int kTiles>
RT_DEVICE void tanh(Stored, float (&n)[kTiles][4]) {
  const auto each = [](auto apply) {
    RT_UNROLL for (int m = 0; m < kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) apply(m, v);
    }
  };
  float far[kTiles][4];
  each([&](int m, int v) { far[m][v] = 1.0f + rt::exp(2.0f * rt::magnitude(n[m][v])); });
  each([&](int m, int v) { far[m][v] = 1.0f - 2.0f * rt::reciprocal(far[m][v]); });
  each([&](int m, int v) {
    const float x = n[m][v], z = x * x;
    float near = 0.021007313887361264955f + z * -0.0061796007726469633011f;
    near = 0.1333245195930986894f + z * (-0.05383736598596564407f + z * near);
    near = x + x * z * (-0.33333313879465202036f + z * near);
    n[m][v] = rt::at_most(rt::magnitude(x), 0.5625f, near, rt::with_sign(far[m][v], x));
  });
}

// h = f(n), in place, to be stored as such a type.
template <class Stored, int kTiles>
RT_DEVICE void activate(Nonlinearity f, float (&n)[kTiles][4]) {
  const auto apply = [&n](auto cell) {
    RT_UNROLL for (int m = 0; m < kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        n[m][v] = decltype(cell)::template value<Math>(n[m][v]);
      }
    }
  };
  // The same for all threads; no switch, which would become a jump through a table.
  if (f == Nonlinearity::kTanh) {
    tanh(Stored{}, n);
  } else if (f == Nonlinearity::kRelu) {
    apply(cells::Relu{});
  } else {
    apply(cells::Sigmoid{});
  }
}

// dh f'(n) from h, in place of dh.
template <int kTiles>
RT_DEVICE void differentiate(Nonlinearity f, float (&dh)[kTiles][4], const float (&h)[kTiles][4]) {
  const auto apply = [&](auto cell) {
    RT_UNROLL for (int m = 0; m < kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        dh[m][v] = decltype(cell)::template backward<Math>(dh[m][v], h[m][v]);
      }
    }
  };
  if (f == Nonlinearity::kTanh) {
    apply(cells::Tanh{});
  } else if (f == Nonlinearity::kRelu) {
    apply(cells::Relu{});
  } else {
    apply(cells::Sigmoid{});
  }
}

}  // namespace rnnfast::cuda
