// The RNN: h = f(p + u), u = W_hh h_prev.
#pragma once

#include "cell.h"
#include "nonlinearity.h"

namespace rnnfast::cells {

template <class Nonlinearity, class Math>
struct Rnn {
  using Vector = typename Math::Vector;
  static constexpr int kGates = 1;
  static constexpr int kCarried = 0;
  static constexpr int kSaved = 0;
  static constexpr int kParameters = 0;
  static constexpr bool kEmits = false;
  static constexpr bool kRecurrentBias = false;
  static constexpr bool kSplitGradient = false;
  static constexpr bool kDirectGradient = false;
  static constexpr bool kReadsPrevious = false;
  static constexpr bool kRecomputesH = !Nonlinearity::kSignAlone;

  RNNFAST_CELL static Vector forward(const Step<Vector>& step, Vector* /*carried*/,
                                     Vector* /*saved*/) {
    return Nonlinearity::template value<Math>(step.p[0] + step.u[0]);
  }

  RNNFAST_CELL static Vector backward(const Left<Vector>& left, const Gradients<Vector>& to) {
    to.p[0] = Nonlinearity::template backward<Math>(left.dh, left.h);
    return Vector{};
  }

  RNNFAST_CELL static Vector gain(Vector h, const Vector* /*saved*/, const Vector* /*parameters*/) {
    return Nonlinearity::template backward<Math>(Vector{} + typename Math::Scalar(1), h);
  }
};

}  // namespace rnnfast::cells
