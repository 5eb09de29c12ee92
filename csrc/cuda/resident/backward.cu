// Backward of one mode and family (instances.cuh), and how many clusters a device has room for.
#include <algorithm>

#include "cuda/resident/backward.cuh"
#include "cuda/resident/instances.cuh"

namespace rnnfast::cuda::RNNFAST_MODE::RNNFAST_FAMILY {
namespace {

template <class K, bool kNorm>
void backward_of(const Plan& plan, const Backward& problem, const Stream& stream) {
  const Grid grid = grid_of(plan, problem.shape, K::kBackwardBytes);
  const auto name = [&] { return what("backward", plan); };
  if (problem.clip > 0) {
    start<backward_kernel<K, kNorm, true>>(problem, grid, stream, name);
  } else {
    start<backward_kernel<K, kNorm, false>>(problem, grid, stream, name);
  }
}

}  // namespace

void backward(const Plan& plan, const Backward& problem, const Stream& stream) {
  choose(plan, [&](auto at) {
    using K = typename decltype(at)::K;
    if (problem.gamma != nullptr) {
      backward_of<K, true>(plan, problem, stream);
    } else {
      backward_of<K, false>(plan, problem, stream);
    }
  });
}

int clusters(int device, int blocks) {
  int least = -1;
  const auto one = [&](auto at) {
    using K = typename decltype(at)::K;
    if (K::kBlocks != blocks) return;
    const Grid grid = {blocks, 1, K::kThreads, K::kBackwardBytes, blocks};
    const int found = most_clusters(backward_kernel<K, true, true>, grid, device);
    if (found >= 0) least = least < 0 ? found : std::min(least, found);
  };
  for_each(one, std::make_index_sequence<std::size(kConfigurations)>{});
  return std::max(least, 0);
}

}  // namespace rnnfast::cuda::RNNFAST_MODE::RNNFAST_FAMILY
