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

extern const CellKernels kRnn[kCells];
const CellKernels kRnn[kCells] = {KernelsOf<RnnTanh>::named("rnn_tanh"),
                                  KernelsOf<RnnRelu>::named("rnn_relu"),
                                  KernelsOf<RnnSigmoid>::named("rnn_sigmoid")};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
