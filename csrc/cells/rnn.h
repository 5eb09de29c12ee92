// The RNN: h = f(p + u), u = W_hh h_prev.
#pragma once

#include "cell.h"

namespace rnnfast::cells {

enum class Nonlinearity { kTanh, kRelu, kSigmoid };

// A nonlinearity gives f(a) and dh f'(a); f' from h = f(a) alone, so that a is never kept.
// kSignAlone: and of h from its sign.
// Math supplies Scalar, Vector (or a scalar, on a device), tanh and sigmoid.
struct Tanh {
  static constexpr bool kSignAlone = false;
  template <class Math>
  RNNFAST_CELL static typename Math::Vector value(typename Math::Vector a) {
    return Math::tanh(a);
  }
  template <class Math>
  RNNFAST_CELL static typename Math::Vector backward(typename Math::Vector dh,
                                                     typename Math::Vector h) {
    return dh * (typename Math::Scalar(1) - h * h);
  }
};

struct Relu {
  static constexpr bool kSignAlone = true;
  // "a < 0" and not a maximum: a NaN fails the comparison and goes on, as in torch.relu. Backward
  // it is a choice and not a product for the same reason: an idle unit stops a NaN or inf of dh.
  template <class Math>
  RNNFAST_CELL static typename Math::Vector value(typename Math::Vector a) {
    const typename Math::Vector zero = {};
    return a < zero ? zero : a;
  }
  template <class Math>
  RNNFAST_CELL static typename Math::Vector backward(typename Math::Vector dh,
                                                     typename Math::Vector h) {
    const typename Math::Vector zero = {};
    return h <= zero ? zero : dh;
  }
};

struct Sigmoid {
  static constexpr bool kSignAlone = false;
  template <class Math>
  RNNFAST_CELL static typename Math::Vector value(typename Math::Vector a) {
    return Math::sigmoid(a);
  }
  template <class Math>
  RNNFAST_CELL static typename Math::Vector backward(typename Math::Vector dh,
                                                     typename Math::Vector h) {
    return dh * (h * (typename Math::Scalar(1) - h));
  }
};

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
