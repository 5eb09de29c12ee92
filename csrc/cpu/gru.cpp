// The GRU, compiled once per SIMD level as loops.cpp is.
#include "cells/gru.h"

#include "loops.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

extern const CellKernels kGru;
const CellKernels kGru = KernelsOf<cells::Gru>::named("gru");

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
