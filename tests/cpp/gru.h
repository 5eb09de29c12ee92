// A GRU cell for the test of the time loop (torch's equations and gate order r, z, n).
#pragma once

#include "../../csrc/cells/cell.h"

namespace rnnfast::cells {

template <class Math>
struct Gru {
  using Vector = typename Math::Vector;
  static constexpr int kGates = 3;
  static constexpr int kCarried = 0;
  static constexpr int kSaved = 4;  // r, z, n, u_n
  static constexpr int kParameters = 0;
  static constexpr bool kEmits = false;
  static constexpr bool kRecurrentBias = true;
  static constexpr bool kSplitGradient = true;
  static constexpr bool kDirectGradient = true;
  static constexpr bool kReadsPrevious = true;
  static constexpr bool kRecomputesH = false;

  RNNFAST_CELL static Vector forward(const Step<Vector>& step, Vector* /*carried*/, Vector* saved) {
    const Vector *p = step.p, *u = step.u;
    const Vector r = Math::sigmoid(p[0] + u[0]);
    const Vector z = Math::sigmoid(p[1] + u[1]);
    const Vector n = Math::tanh(p[2] + r * u[2]);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = u[2];
    return n + z * (step.h_prev - n);
  }

  RNNFAST_CELL static Vector backward(const Left<Vector>& left, const Gradients<Vector>& to) {
    const Vector r = left.saved[0], z = left.saved[1], n = left.saved[2], u_n = left.saved[3];
    const typename Math::Scalar one = 1;
    const Vector da_n = left.dh * (one - z) * (one - n * n);
    to.p[0] = to.u[0] = da_n * u_n * r * (one - r);
    to.p[1] = to.u[1] = left.dh * (left.h_prev - n) * z * (one - z);
    to.p[2] = da_n;
    to.u[2] = da_n * r;
    return left.dh * z;
  }

  RNNFAST_CELL static Vector gain(Vector /*h*/, const Vector* saved, const Vector* /*parameters*/) {
    return saved[1];
  }
};

}  // namespace rnnfast::cells
