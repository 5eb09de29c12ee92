// Compiled once per SIMD level, with -DRNNFAST_SIMD_PORTABLE, _AVX2 or _AVX512 and the flags that
// go with it. Nothing but this level's namespace may leave this object file.
#include "../cells/rnn.h"
#include "launch.h"
#include "math.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {
namespace {

template <class F, class S>
using Elman = cells::Elman<F, Math<Arithmetic<S>>>;

template <class F, class S, bool kNorm>
void forward_from(const ForwardProblem& problem) {
  if (problem.w_ih != nullptr) {
    forward<Elman<F, S>, S, Arithmetic<S>, kNorm>(problem);
  } else {
    forward<Elman<F, S>, S, S, kNorm>(problem);
  }
}

template <class F, class S>
void forward_of(const ForwardProblem& problem) {
  if (problem.gamma != nullptr) {
    forward_from<F, S, true>(problem);
  } else {
    forward_from<F, S, false>(problem);
  }
}

template <class F, class S>
void backward_of(const BackwardProblem& problem) {
  if (problem.gamma != nullptr || problem.record != nullptr || problem.clip < __builtin_inf()) {
    backward<Elman<F, S>, S, true>(problem);
  } else {
    backward<Elman<F, S>, S, false>(problem);
  }
}

template <class F>
void forward_as(const ForwardProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return forward_of<F, float>(problem);
    case Dtype::kFloat64:
      return forward_of<F, double>(problem);
    case Dtype::kBFloat16:
      return forward_of<F, BFloat16>(problem);
    case Dtype::kFloat16:
      return forward_of<F, Float16>(problem);
  }
}

template <class F>
void backward_as(const BackwardProblem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return backward_of<F, float>(problem);
    case Dtype::kFloat64:
      return backward_of<F, double>(problem);
    case Dtype::kBFloat16:
      return backward_of<F, BFloat16>(problem);
    case Dtype::kFloat16:
      return backward_of<F, Float16>(problem);
  }
}

Plan plan(Dtype dtype, const Shape& shape, int threads) {
  return dtype == Dtype::kFloat64 ? plan_call<double>(shape, 1, threads)
                                  : plan_call<float>(shape, 1, threads);
}

}  // namespace

extern const CellKernels kRnn[kCells];
const CellKernels kRnn[kCells] = {
    {"rnn_tanh", forward_as<cells::Tanh>, backward_as<cells::Tanh>, plan},
    {"rnn_relu", forward_as<cells::Relu>, backward_as<cells::Relu>, plan},
    {"rnn_sigmoid", forward_as<cells::Sigmoid>, backward_as<cells::Sigmoid>, plan}};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
