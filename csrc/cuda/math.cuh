// f and its derivative on a device, over the values of a lane.
#pragma once

#include "problem.h"
#include "rt.cuh"

namespace rnnfast::cuda {

// Math of the cells on a device.
struct Math {
  using Scalar = float;
  using Vector = float;

  // Two ways and a choice, as on the CPU (cpu/math.h): near zero the fraction cancels.
  RT_DEVICE static float tanh(float x) {
    const float z = x * x;
    float near = 0.021007313887361264955f + z * -0.0061796007726469633011f;
    near = 0.1333245195930986894f + z * (-0.05383736598596564407f + z * near);
    near = x + x * z * (-0.33333313879465202036f + z * near);
    const float size = rt::magnitude(x);
    const float far = 1.0f - rt::quick_divide(2.0f, 1.0f + rt::exp(2.0f * size));
    return size <= 0.5625f ? near : x < 0.0f ? -far : far;
  }

  RT_DEVICE static float sigmoid(float x) { return rt::quick_divide(1.0f, 1.0f + rt::exp(-x)); }
};

// h = f(n), in place.
template <int kTiles>
RT_DEVICE void activate(Nonlinearity f, float (&n)[kTiles][4]) {
  const auto apply = [&n](auto cell) {
    RT_UNROLL for (int m = 0; m < kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        n[m][v] = decltype(cell)::template value<Math>(n[m][v]);
      }
    }
  };
  switch (f) {  // the same for all threads
    case Nonlinearity::kTanh:
      return apply(cells::Tanh{});
    case Nonlinearity::kRelu:
      return apply(cells::Relu{});
    case Nonlinearity::kSigmoid:
      return apply(cells::Sigmoid{});
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
  switch (f) {
    case Nonlinearity::kTanh:
      return apply(cells::Tanh{});
    case Nonlinearity::kRelu:
      return apply(cells::Relu{});
    case Nonlinearity::kSigmoid:
      return apply(cells::Sigmoid{});
  }
}

}  // namespace rnnfast::cuda
