// The LSTM, compiled once per SIMD level as loops.cpp is.
#include "cells/lstm.h"

#include "loops.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

extern const CellKernels kLstm;
const CellKernels kLstm = KernelsOf<cells::Lstm>::named("lstm");

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
