// The kernels that go through time, of one mode and one family: RNNFAST_MODE is the mode's name,
// RNNFAST_MODE_TYPE its type, RNNFAST_FAMILY single_block or cluster. forward.cu and backward.cu
// include this file; nvcc compiles each of them once for every mode and family, the host's compiler
// does so for the emulation. Two objects, because ptxas takes longest of all steps of the build.
#pragma once

#include <iterator>
#include <string>
#include <utility>

#include "cuda/host/launch.h"
#include "cuda/host/start.cuh"
#include "cuda/resident/kernel.cuh"

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
  using K = Kernel<Type, c.units, c.tiles, c.blocks, c.parts, c.shared_products>;
  static_assert(K::kForwardBytes == forward_bytes(kMode, c));
  static_assert(K::kBackwardBytes == backward_bytes(kMode, c));
  static_assert(K::kBackwardBytes <= (c.blocks == 1 ? 48 << 10 : kShared));
};

inline std::string what(const char* pass, const Plan& plan) {
  return std::string("kernel ") + pass + " of " + RNNFAST_NAME(RNNFAST_MODE) + ", of the plan \"" +
         text(plan) + "\"";
}

// A grid is at most 65535 in y, groups; 2^31 - 1 in x, slices of the batch.
inline Grid grid_of(const Plan& plan, const Shape& shape, int shared) {
  const int blocks = plan.configuration.blocks;
  return {plan.slices * blocks, shape.groups, plan.threads, static_cast<std::size_t>(shared),
          blocks};
}

inline bool same(const Configuration& a, const Configuration& b) {
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
}  // namespace rnnfast::cuda::RNNFAST_MODE::RNNFAST_FAMILY
