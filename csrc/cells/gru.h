// The GRU of torch and cuDNN; gates r, z, n; u = W_hh h_prev + b_hh:
//   n = tanh(p_n + s(a_r) u_n),  h = (1 - s(a_z)) n + s(a_z) h_prev,  a = p + u.
#pragma once

#include "cell.h"

namespace rnnfast::cells {

template <class Math>
struct Gru {
  using Vector = typename Math::Vector;
  using Scalar = typename Math::Scalar;
  static constexpr int kGates = 3;
  static constexpr int kCarried = 0;
  // r, a_z, n, u_n. a_z and not z: in 16 bits a z of 0.999 is stored as 1, and nothing would be
  // forgotten.
  static constexpr int kSaved = 4;
  static constexpr int kParameters = 0;
  static constexpr bool kEmits = false;
  static constexpr bool kRecurrentBias = true;
  static constexpr bool kSplitGradient = true;
  static constexpr bool kDirectGradient = true;
  static constexpr bool kReadsPrevious = true;
  static constexpr bool kRecomputesH = false;

  RNNFAST_CELL static Vector forward(const Step<Vector>& step, Vector* /*carried*/, Vector* saved) {
    const Vector *p = step.p, *u = step.u;
    saved[0] = Math::sigmoid(p[0] + u[0]);
    saved[1] = p[1] + u[1];
    saved[2] = Math::tanh(p[2] + saved[0] * u[2]);
    saved[3] = u[2];
    return saved[2] + Math::sigmoid(saved[1]) * (step.h_prev - saved[2]);
  }

  RNNFAST_CELL static Vector backward(const Left<Vector>& left, const Gradients<Vector>& to) {
    const Vector r = left.saved[0], a_z = left.saved[1], n = left.saved[2], u_n = left.saved[3];
    const Scalar one = 1;
    const Vector z = Math::sigmoid(a_z), rest = Math::sigmoid(-a_z);  // 1 - z, exact near z = 1
    const Vector da_n = left.dh * rest * (one - n * n);
    to.p[0] = to.u[0] = da_n * u_n * (r * (one - r));
    to.p[1] = to.u[1] = left.dh * (left.h_prev - n) * (z * rest);
    to.p[2] = da_n;
    to.u[2] = da_n * r;
    return left.dh * z;
  }

  RNNFAST_CELL static Vector gain(Vector /*h*/, const Vector* saved, const Vector* /*parameters*/) {
    return Math::sigmoid(saved[1]);
  }
};

}  // namespace rnnfast::cells
