// Compiled once per SIMD level, with -DRNNFAST_SIMD_PORTABLE, _AVX2 or _AVX512 and the flags that
// go with it. Nothing but this level's namespace may leave this object file.
#include "loops.h"

#include "launch.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

template void forward(const CellPoints<float>&, const ForwardProblem&);
template void forward(const CellPoints<double>&, const ForwardProblem&);
template void forward(const CellPoints<BFloat16>&, const ForwardProblem&);
template void forward(const CellPoints<Float16>&, const ForwardProblem&);
template void backward(const CellPoints<float>&, const BackwardProblem&);
template void backward(const CellPoints<double>&, const BackwardProblem&);
template void backward(const CellPoints<BFloat16>&, const BackwardProblem&);
template void backward(const CellPoints<Float16>&, const BackwardProblem&);

Plan plan(int gates, Dtype dtype, const Shape& shape, int threads) {
  return dtype == Dtype::kFloat64 ? plan_call<double>(shape, gates, threads)
                                  : plan_call<float>(shape, gates, threads);
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
