// Forward of one mode and family (instances.cuh).
#include "cuda/resident/forward.cuh"
#include "cuda/resident/instances.cuh"

namespace rnnfast::cuda::RNNFAST_MODE::RNNFAST_FAMILY {
namespace {

template <class K>
void forward_of(const Plan& plan, const Forward& problem, const Stream& stream) {
  const Grid grid = grid_of(plan, problem.shape, K::kForwardBytes);
  const auto name = [&] { return what("forward", plan); };
  if (problem.gamma != nullptr) {
    start<forward_kernel<K, true>>(problem, grid, stream, name);
  } else {
    start<forward_kernel<K, false>>(problem, grid, stream, name);
  }
}

}  // namespace

void forward(const Plan& plan, const Forward& problem, const Stream& stream) {
  choose(plan, [&](auto at) { forward_of<typename decltype(at)::K>(plan, problem, stream); });
}

}  // namespace rnnfast::cuda::RNNFAST_MODE::RNNFAST_FAMILY
