// A GRU cell for the test of the time loop (torch's equations and gate order r, z, n).
#pragma once

#include "../../csrc/cells/rnn.h"

namespace rnnfast::cells {

template <class Math>
struct Gru {
  using Vector = typename Math::Vector;
  static constexpr int kGates = 3;
  static constexpr int kCarried = 0;
  static constexpr int kSaved = 4;  // r, z, n, u_n
  static constexpr bool kRecurrentBias = true;
  static constexpr bool kSplitGradient = true;
  static constexpr bool kDirectGradient = true;
  static constexpr bool kReadsPrevious = true;
  static constexpr bool kNormalizes = false;

  RNNFAST_CELL static Vector forward(const Vector* p, const Vector* u, Vector h_prev,
                                     Vector* /*carried*/, Vector* saved) {
    const Vector r = Math::sigmoid(p[0] + u[0]);
    const Vector z = Math::sigmoid(p[1] + u[1]);
    const Vector n = Math::tanh(p[2] + r * u[2]);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = u[2];
    return n + z * (h_prev - n);
  }

  RNNFAST_CELL static Vector backward(Vector dh, Vector /*h*/, Vector h_prev, const Vector* saved,
                                      Vector* /*dcarried*/, Vector* dp, Vector* du) {
    const Vector r = saved[0], z = saved[1], n = saved[2], u_n = saved[3];
    const typename Math::Scalar one = 1;
    const Vector da_n = dh * (one - z) * (one - n * n);
    dp[0] = du[0] = da_n * u_n * r * (one - r);
    dp[1] = du[1] = dh * (h_prev - n) * z * (one - z);
    dp[2] = da_n;
    du[2] = da_n * r;
    return dh * z;
  }
};

}  // namespace rnnfast::cells
