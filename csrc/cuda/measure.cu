// The kernel that measures a backward pass (measure.cuh), of all modes.
#include <stdexcept>

#include "launch.h"
#include "measure.cuh"
#include "start.cuh"

namespace rnnfast::cuda {

void measure(Mode mode, const Measured& problem, const Stream& stream) {
  constexpr std::size_t kShared = kMeasureWarps * sizeof(Row);
  const int directions = problem.shape.groups / problem.shape.heads;
  const Grid grid = {problem.shape.steps, directions, 32 * kMeasureWarps, kShared, 1};
  switch (mode) {
    case Mode::kBFloat16:
      return start<measure_kernel<BFloat16>>(problem, grid, stream, "kernel measure of bfloat16");
    case Mode::kFloat16:
      return start<measure_kernel<Float16>>(problem, grid, stream, "kernel measure of float16");
    case Mode::kTf32:
    case Mode::kExact:
      return start<measure_kernel<float>>(problem, grid, stream, "kernel measure of float32");
  }
}

// All kernels are compiled for the same devices, but for clusters, which the plan asks for.
std::string unusable(int device) {
  return why_not(reinterpret_cast<const void*>(&measure_kernel<float>), device);
}

}  // namespace rnnfast::cuda
