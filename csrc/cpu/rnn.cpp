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
template <class Math>
using RnnSoftplus = cells::Rnn<cells::Softplus, Math>;

}  // namespace

extern const CellKernels kRnnTanh, kRnnRelu, kRnnSigmoid, kRnnSoftplus;
const CellKernels kRnnTanh = KernelsOf<RnnTanh>::named("rnn_tanh");
const CellKernels kRnnRelu = KernelsOf<RnnRelu>::named("rnn_relu");
const CellKernels kRnnSigmoid = KernelsOf<RnnSigmoid>::named("rnn_sigmoid");
const CellKernels kRnnSoftplus = KernelsOf<RnnSoftplus>::named("rnn_softplus");

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
