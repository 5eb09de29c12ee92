// The kernels of any cell, as a cell's source file sees them: loops.cpp compiles them, once for
// each storage type.
#pragma once

#include "math.h"
#include "points.h"
#include "problem.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

template <class S>
void forward(const CellPoints<S>& cell, const ForwardProblem& problem);
template <class S>
void backward(const CellPoints<S>& cell, const BackwardProblem& problem);
Plan plan(int gates, Dtype dtype, const Shape& shape, int threads);

// The kernels of one cell: Cell<Math> is what cells/cell.h asks for.
template <template <class> class Cell>
struct KernelsOf {
  static constexpr CellKernels named(const char* name) {
    return {name, &forward_of, &backward_of, &plan_of};
  }

 private:
  template <class S>
  static constexpr const CellPoints<S>& points() {
    return kPoints<Cell<Math<Arithmetic<S>>>, S>;
  }

  static void forward_of(const ForwardProblem& problem) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return forward(points<float>(), problem);
      case Dtype::kFloat64:
        return forward(points<double>(), problem);
      case Dtype::kBFloat16:
        return forward(points<BFloat16>(), problem);
      case Dtype::kFloat16:
        return forward(points<Float16>(), problem);
    }
  }

  static void backward_of(const BackwardProblem& problem) {
    switch (problem.dtype) {
      case Dtype::kFloat32:
        return backward(points<float>(), problem);
      case Dtype::kFloat64:
        return backward(points<double>(), problem);
      case Dtype::kBFloat16:
        return backward(points<BFloat16>(), problem);
      case Dtype::kFloat16:
        return backward(points<Float16>(), problem);
    }
  }

  static Plan plan_of(Dtype dtype, const Shape& shape, int threads) {
    return plan(Cell<Math<float>>::kGates, dtype, shape, threads);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
