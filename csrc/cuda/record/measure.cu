// The kernel that measures a backward pass (measure.cuh), of all modes.
#include <string>

#include "cuda/host/launch.h"
#include "cuda/host/start.cuh"
#include "cuda/record/measure.cuh"

namespace rnnfast::cuda {

void measure(const Plan& plan, const Measured& problem, const Stream& stream) {
  constexpr std::size_t kShared = kMeasureWarps * sizeof(Row);
  const int directions = problem.shape.groups / problem.shape.heads;
  const Grid grid = {problem.shape.steps, directions, 32 * kMeasureWarps, kShared, 1};
  const auto what = [] { return std::string("kernel measure"); };
  switch (plan.mode) {
    case Mode::kBFloat16:
      return start<measure_kernel<BFloat16>>(problem, grid, stream, what);
    case Mode::kFloat16:
      return start<measure_kernel<Float16>>(problem, grid, stream, what);
    case Mode::kTf32:
    case Mode::kExact:
      return start<measure_kernel<float>>(problem, grid, stream, what);
  }
}

// All kernels are compiled for the same devices, but for clusters, which the plan asks for.
std::string unusable() { return why_not(reinterpret_cast<const void*>(&measure_kernel<float>)); }

}  // namespace rnnfast::cuda
