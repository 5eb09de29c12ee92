// The nonlinearities of the cells, for the host and for devices: f(a), and dh f'(a) from h = f(a)
// alone, so that a is never kept.
//
// kSignAlone: f' needs only the sign of h.
// Math supplies Scalar, Vector (a scalar on a device), tanh and sigmoid, and on the host softplus
// and one_minus_exp.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__CUDACC__)
#define RNNFAST_CELL __host__ __device__ __forceinline__
#else
#define RNNFAST_CELL [[gnu::always_inline]] inline
#endif

namespace rnnfast::cells {

enum class Nonlinearity { kTanh, kRelu, kSigmoid };  // those of the kernels for devices

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

// Where h is next to 0 so is f', and 1 - exp(-h) would cancel.
struct Softplus {
  static constexpr bool kSignAlone = false;
  template <class Math>
  RNNFAST_CELL static typename Math::Vector value(typename Math::Vector a) {
    return Math::softplus(a);
  }
  template <class Math>
  RNNFAST_CELL static typename Math::Vector backward(typename Math::Vector dh,
                                                     typename Math::Vector h) {
    return dh * Math::one_minus_exp(h);
  }
};

// Calls with(Tanh{}), with(Relu{}) or with(Sigmoid{}). No switch, which would become a jump through
// a table: on a device f is the same for all threads, and a branch costs less.
template <class With>
RNNFAST_CELL void with_nonlinearity(Nonlinearity f, With with) {
  if (f == Nonlinearity::kTanh) {
    with(Tanh{});
  } else if (f == Nonlinearity::kRelu) {
    with(Relu{});
  } else {
    with(Sigmoid{});
  }
}

// From the name of an RNN cell.
inline void from_name(const char* cell, Nonlinearity& to) {
  const std::string_view name = cell;
  if (name == "rnn_tanh") {
    to = Nonlinearity::kTanh;
  } else if (name == "rnn_relu") {
    to = Nonlinearity::kRelu;
  } else if (name == "rnn_sigmoid") {
    to = Nonlinearity::kSigmoid;
  } else {
    throw std::invalid_argument("unknown cell '" + std::string(name) +
                                "'; known: rnn_tanh, rnn_relu, rnn_sigmoid");
  }
}

}  // namespace rnnfast::cells
