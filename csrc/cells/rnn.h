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

#if defined(__CUDACC__)
#define RNNFAST_CELL __host__ __device__ __forceinline__
#else
#define RNNFAST_CELL [[gnu::always_inline]] inline
#endif

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
