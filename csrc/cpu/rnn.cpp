// The cells of the RNN, compiled once per SIMD level as loops.cpp is.
#include "cells/rnn.h"

#include "loops.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {
namespace {

template <class Math>
using RnnTanh = cells::Rnn<cells::Tanh, Math>;
template <class Math>
using RnnRelu = cells::Rnn<cells::Relu, Math>;
template <class Math>
using RnnSigmoid = cells::Rnn<cells::Sigmoid, Math>;

}  // namespace

extern const CellKernels kRnnTanh, kRnnRelu, kRnnSigmoid;
const CellKernels kRnnTanh = KernelsOf<RnnTanh>::named("rnn_tanh");
const CellKernels kRnnRelu = KernelsOf<RnnRelu>::named("rnn_relu");
const CellKernels kRnnSigmoid = KernelsOf<RnnSigmoid>::named("rnn_sigmoid");

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
