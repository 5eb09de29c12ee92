// A leaky RNN of the current form for the test of the time loop, with a leak for each unit that is
// learned: v' = v + leak (p + u - v), u = W_hh h, h = f(v). f is a sigmoid, so that h of a state of
// zeros is not 0.
#pragma once

#include "../../csrc/cells/cell.h"

namespace rnnfast::cells {

template <class Math>
struct Leaky {
  using Vector = typename Math::Vector;
  static constexpr int kGates = 1;
  static constexpr int kCarried = 1;     // v
  static constexpr int kSaved = 1;       // p + u - v
  static constexpr int kParameters = 1;  // leak
  static constexpr bool kEmits = true;
  static constexpr bool kRecurrentBias = false;
  static constexpr bool kSplitGradient = false;
  static constexpr bool kDirectGradient = false;
  static constexpr bool kReadsPrevious = false;
  static constexpr bool kRecomputesH = false;

  RNNFAST_CELL static Vector forward(const Step<Vector>& step, Vector* carried, Vector* saved) {
    saved[0] = (step.p[0] + step.u[0]) - carried[0];
    carried[0] += step.parameters[0] * saved[0];
    return Math::sigmoid(carried[0]);
  }

  RNNFAST_CELL static Vector backward(const Left<Vector>& left, const Gradients<Vector>& to) {
    const Vector dv = to.carried[0] + left.dh * slope(left.h);
    to.p[0] = left.parameters[0] * dv;
    to.parameters[0] = dv * left.saved[0];
    to.carried[0] = dv - to.p[0];
    return Vector{};
  }

  RNNFAST_CELL static Vector gain(Vector /*h*/, const Vector* /*saved*/, const Vector* parameters) {
    return typename Math::Scalar(1) - parameters[0];
  }

  RNNFAST_CELL static Vector emit(const Vector* carried, const Vector* /*parameters*/) {
    return Math::sigmoid(carried[0]);
  }
  RNNFAST_CELL static void emit_back(Vector dh, const Vector* carried, const Vector* /*parameters*/,
                                     Vector* dcarried) {
    dcarried[0] += dh * slope(Math::sigmoid(carried[0]));
  }

 private:
  RNNFAST_CELL static Vector slope(Vector h) { return h * (typename Math::Scalar(1) - h); }
};

}  // namespace rnnfast::cells
