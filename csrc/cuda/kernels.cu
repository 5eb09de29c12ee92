// The kernels that go through time, of one mode and one family: RNNFAST_MODE is its name,
// RNNFAST_MODE_TYPE its type, RNNFAST_FAMILY single_block or cluster. Compiled once for each, and
// by the host's compiler for the emulation.
#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"
#include "start.cuh"

namespace rnnfast::cuda::RNNFAST_MODE::RNNFAST_FAMILY {
namespace {

using Type = RNNFAST_MODE_TYPE;
constexpr Mode kMode = RNNFAST_MODE_VALUE;
constexpr Family kFamily = RNNFAST_FAMILY_VALUE;
constexpr const auto& kConfigurations = configurations_of<kMode, kFamily>();
constexpr int kShared = 227 << 10;  // most that a block can ask for, of the devices with clusters

template <int kIndex>
struct At {
  static constexpr Configuration c = kConfigurations[kIndex];
  using K = Kernel<Type, c.units, c.tiles, c.blocks, c.parts, c.staged>;
  static_assert(K::kForwardBytes == forward_bytes(kMode, c));
  static_assert(K::kBackwardBytes == backward_bytes(kMode, c));
  static_assert(K::kBackwardBytes <= (c.blocks == 1 ? 48 << 10 : kShared));
};

std::string what(const char* pass, const Plan& plan) {
  return std::string("kernel ") + pass + " of " + RNNFAST_NAME(RNNFAST_MODE) + ", of the plan \"" +
         text(plan) + "\"";
}

// A grid is at most 65535 in y, groups; 2^31 - 1 in x, slices of the batch.
Grid grid_of(const Plan& plan, const Shape& shape, int shared) {
  const int blocks = plan.configuration.blocks;
  return {plan.slices * blocks, shape.groups, plan.threads, static_cast<std::size_t>(shared),
          blocks};
}

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

template <class K, bool kNorm>
void backward_of(const Plan& plan, const Backward& problem, const Stream& stream) {
  const Grid grid = grid_of(plan, problem.shape, K::kBackwardBytes);
  const auto name = [&] { return what("backward", plan); };
  if (problem.limit > 0) {
    start<backward_kernel<K, kNorm, true>>(problem, grid, stream, name);
  } else {
    start<backward_kernel<K, kNorm, false>>(problem, grid, stream, name);
  }
}

bool same(const Configuration& a, const Configuration& b) {
  return a.units == b.units && a.blocks == b.blocks;
}

// Calls with(At<i>) for all.
template <class With, std::size_t... kIndices>
void for_each(With with, std::index_sequence<kIndices...>) {
  (with(At<kIndices>{}), ...);
}

template <class With>
void choose(const Plan& plan, With with) {
  bool found = false;
  const auto one = [&](auto at) {
    if (!same(at.c, plan.configuration)) return;
    found = true;
    with(at);
  };
  for_each(one, std::make_index_sequence<std::size(kConfigurations)>{});
  if (!found) throw std::runtime_error(what("", plan) + ": there is none");
}

}  // namespace

void forward(const Plan& plan, const Forward& problem, const Stream& stream) {
  choose(plan, [&](auto at) { forward_of<typename decltype(at)::K>(plan, problem, stream); });
}

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
