// The interface of a cell. A cell is a struct template over Math, in a header of its own beside
// this one: rnn.h is the shortest example. It knows one unit (or one vector of units) and one step;
// the time loops know everything else, and no cell's name.
//
// Its numbers:
//   kGates           products with the state per unit: p, u, dp and du have this many values
//   kCarried         states that travel in time beside h, in the arithmetic type: c of an LSTM
//   kSaved           values per unit that forward leaves for backward beside h
//   kParameters      values per unit that the cell learns: the leak
//   kEmits           h is no state but made of the carried ones: f(v). emit and emit_back say how
//   kRecurrentBias   u starts at b_hh (GRU: b_hn is inside the reset product); else p has it
//   kSplitGradient   du differs from dp
//   kDirectGradient  h_prev also acts outside u: backward returns that part of its gradient, and
//                    forward reads h_prev as it was before it was rounded to be stored
//   kReadsPrevious   backward reads h_prev
//   kRecomputesH     with layer norm in 16 bits, backward takes h again from the normalized sum: a
//                    rounded h has few digits of f' left where f is flat
//
// Its functions; Vector is Math::Vector, and arrays of zero values are never followed:
//   Vector forward(const Step<Vector>&, Vector* carried, Vector* saved)
//       carried: in, as the last step left them; out, as this one does. Returns h.
//   Vector backward(const Left<Vector>&, const Gradients<Vector>&)
//       Returns the direct part of dh_prev.
//   Vector gain(Vector h, const Vector* saved, const Vector* parameters)
//       The factor that passes straight through a step; the record has its mean.
//   With kEmits:
//   Vector emit(const Vector* carried, const Vector* parameters)
//       h of given states: at the start, where carried is given from outside, and after a reset.
//   void emit_back(Vector dh, const Vector* carried, const Vector* parameters, Vector* dcarried)
//       Adds dh's part to dcarried.
#pragma once

#include "nonlinearity.h"  // RNNFAST_CELL

namespace rnnfast::cells {

// Inputs of forward. With layer norm of p + u, the normalized sum is u and p is -0.
template <class Vector>
struct Step {
  const Vector* p;
  const Vector* u;  // W_hh h_prev
  Vector h_prev;
  const Vector* parameters;
};

// Inputs of backward.
template <class Vector>
struct Left {
  Vector dh;
  Vector h;
  Vector h_prev;
  const Vector* saved;
  const Vector* parameters;
};

// Outputs of backward. `carried` goes in as the gradient of the states after this step and comes
// out as the gradient of the states before it.
template <class Vector>
struct Gradients {
  Vector* carried;
  Vector* p;
  Vector* u;           // with kSplitGradient
  Vector* parameters;  // of this step
  Vector* total;       // of the carried states, with their parts through h; not with kEmits
};

}  // namespace rnnfast::cells
