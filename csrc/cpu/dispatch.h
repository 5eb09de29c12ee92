// Run-time choice among the SIMD levels that were built in.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace rnnfast::cpu {

// Defined by kernels.cpp, once per level.
#define RNNFAST_DECLARE_LEVEL(level)                                \
  namespace level {                                                 \
  void elman_forward(Nonlinearity, Dtype, const ForwardProblem&);   \
  void elman_backward(Nonlinearity, Dtype, const BackwardProblem&); \
  Plan elman_plan(Dtype, const Shape&, int threads);                \
  }
RNNFAST_DECLARE_LEVEL(portable)
RNNFAST_DECLARE_LEVEL(avx2)
RNNFAST_DECLARE_LEVEL(avx512)
#undef RNNFAST_DECLARE_LEVEL

struct Kernels {
  const char* level;
  void (*elman_forward)(Nonlinearity, Dtype, const ForwardProblem&);
  void (*elman_backward)(Nonlinearity, Dtype, const BackwardProblem&);
  Plan (*elman_plan)(Dtype, const Shape&, int threads);
};

// The level in use: the best that this machine runs, until set_simd_level.
const Kernels& kernels();

std::vector<std::string> simd_levels();         // usable here, best last
void set_simd_level(const std::string& level);  // std::invalid_argument for any other name

}  // namespace rnnfast::cpu
