// The Elman cell: pointwise maths of one time step, h = f(p + u), u = W_hh h_prev.
//
// What a time loop asks of any cell (an LSTM or a GRU is another header like this one):
//   kGates           products with the state per unit; p, u, dp, du have this many values
//   kCarried         values that travel in time beside h (c of an LSTM)
//   kSaved           values per unit that forward leaves for backward beside h
//   kRecurrentBias   u starts at a bias of its own (GRU: b_hn is inside the reset product)
//   kSplitGradient   du differs from dp, and both are wanted outside
//   kDirectGradient  h_prev also acts outside u: backward returns that part of its gradient
//   kReadsPrevious   backward reads h_prev
//   kNormalizes      p + u of its one gate may go through layer norm
//   kSignAlone       with kNormalizes: of h, backward asks for the sign
// Arrays of zero values are passed as pointers that must not be followed.
#pragma once

#include "nonlinearity.h"

namespace rnnfast::cells {

template <class Nonlinearity, class Math>
struct Elman {
  using Vector = typename Math::Vector;
  static constexpr int kGates = 1;
  static constexpr int kCarried = 0;
  static constexpr int kSaved = 0;
  static constexpr bool kRecurrentBias = false;
  static constexpr bool kSplitGradient = false;
  static constexpr bool kDirectGradient = false;
  static constexpr bool kReadsPrevious = false;
  static constexpr bool kNormalizes = true;
  static constexpr bool kSignAlone = Nonlinearity::kSignAlone;

  // carried: in, its old values; out, its new ones. Returns h.
  RNNFAST_CELL static Vector forward(const Vector* p, const Vector* u, Vector /*h_prev*/,
                                     Vector* /*carried*/, Vector* /*saved*/) {
    return Nonlinearity::template value<Math>(p[0] + u[0]);
  }

  // dcarried: in, the gradient of what this step left; out, of what it found.
  // du is filled only with kSplitGradient. Returns the direct part of dh_prev.
  RNNFAST_CELL static Vector backward(Vector dh, Vector h, Vector /*h_prev*/,
                                      const Vector* /*saved*/, Vector* /*dcarried*/, Vector* dp,
                                      Vector* /*du*/) {
    dp[0] = Nonlinearity::template backward<Math>(dh, h);
    return Vector{};
  }
};

}  // namespace rnnfast::cells
