// The LSTM of torch and cuDNN; gates i, f, g, o:
//   c = s(a_f) c_prev + s(a_i) tanh(a_g),  h = s(a_o) tanh(c),  a = p + W_hh h_prev.
#pragma once

#include "cell.h"

namespace rnnfast::cells {

template <class Math>
struct Lstm {
  using Vector = typename Math::Vector;
  using Scalar = typename Math::Scalar;
  static constexpr int kGates = 4;
  static constexpr int kCarried = 1;  // c
  // i, a_f, g, o, c_prev. a_f and not f: in 16 bits an f of 0.999 is stored as 1, and nothing would
  // be forgotten.
  static constexpr int kSaved = 5;
  static constexpr int kParameters = 0;
  static constexpr bool kEmits = false;
  static constexpr bool kRecurrentBias = false;
  static constexpr bool kSplitGradient = false;
  static constexpr bool kDirectGradient = false;
  static constexpr bool kReadsPrevious = false;
  static constexpr bool kRecomputesH = false;

  RNNFAST_CELL static Vector forward(const Step<Vector>& step, Vector* carried, Vector* saved) {
    const Vector *p = step.p, *u = step.u;
    saved[0] = Math::sigmoid(p[0] + u[0]);
    saved[1] = p[1] + u[1];
    saved[2] = Math::tanh(p[2] + u[2]);
    saved[3] = Math::sigmoid(p[3] + u[3]);
    saved[4] = carried[0];
    carried[0] = Math::sigmoid(saved[1]) * saved[4] + saved[0] * saved[2];
    return saved[3] * Math::tanh(carried[0]);
  }

  RNNFAST_CELL static Vector backward(const Left<Vector>& left, const Gradients<Vector>& to) {
    const Vector *saved = left.saved, dh = left.dh;
    const Vector i = saved[0], f = Math::sigmoid(saved[1]), g = saved[2], o = saved[3];
    const Vector c_prev = saved[4];
    const Scalar one = 1;
    const Vector tanh = Math::tanh(f * c_prev + i * g);
    const Vector dc = to.carried[0] + dh * o * (one - tanh * tanh);
    to.p[0] = dc * g * (i * (one - i));
    to.p[1] = dc * c_prev * (f * Math::sigmoid(-saved[1]));  // 1 - f, exact near f = 1
    to.p[2] = dc * i * (one - g * g);
    to.p[3] = dh * tanh * (o * (one - o));
    to.carried[0] = dc * f;
    to.total[0] = dc;
    return Vector{};
  }

  RNNFAST_CELL static Vector gain(Vector /*h*/, const Vector* saved, const Vector* /*parameters*/) {
    return Math::sigmoid(saved[1]);
  }
};

}  // namespace rnnfast::cells
