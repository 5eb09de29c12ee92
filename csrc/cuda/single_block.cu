// The kernels of one block, of one mode: RNNFAST_MODE is its name and RNNFAST_MODE_TYPE its type.
// Compiled once for each, and by the host's compiler for the emulation.
#include <string>
#include <utility>

#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"
#include "measure.cuh"
#include "start.cuh"

namespace rnnfast::cuda::RNNFAST_MODE {
namespace {

#define RNNFAST_TEXT(word) #word
#define RNNFAST_NAME(word) RNNFAST_TEXT(word)
constexpr const char* kName = RNNFAST_NAME(RNNFAST_MODE);

using Type = RNNFAST_MODE_TYPE;
constexpr Mode kMode = RNNFAST_MODE_VALUE;
constexpr const auto& kConfigurations = configurations_of<kMode>();

template <int kIndex>
using Kernel = SingleBlock<Type, kConfigurations[kIndex].units, kConfigurations[kIndex].tiles>;

std::string what(const char* pass, const Plan& plan) {
  return std::string("kernel single_block_") + pass + ", " + kName + ", of the plan \"" +
         text(plan) + "\"";
}

// A grid is at most 65535 in y, groups; 2^31 - 1 in x, slices of the batch.
Grid grid_of(const Plan& plan, const Shape& shape, int shared) {
  return {plan.slices, shape.groups, plan.threads, static_cast<std::size_t>(shared)};
}

template <auto kKernel, class Arguments>
void start_one(const Arguments& arguments, const Grid& grid, const Stream& stream,
               const std::string& what) {
#ifdef RNNFAST_EMULATION
  start<Arguments>(kKernel, arguments, grid, stream, what);
#else
  static std::atomic<std::uint64_t> loaded{0};
  start<Arguments>(kKernel, arguments, grid, stream, what, loaded);
#endif
}

template <class K>
void forward_of(const Plan& plan, const Forward& problem, const Stream& stream) {
  static_assert(K::kForwardBytes == forward_bytes(kMode, {K::kUnits, K::kTiles}));
  const Grid grid = grid_of(plan, problem.shape, K::kForwardBytes);
  const std::string name = what("forward", plan);
  if (problem.gamma != nullptr) {
    start_one<forward_in_block<K, true>>(problem, grid, stream, name);
  } else {
    start_one<forward_in_block<K, false>>(problem, grid, stream, name);
  }
}

template <class K>
void backward_of(const Plan& plan, const Backward& problem, const Stream& stream) {
  static_assert(K::kBackwardBytes == backward_bytes(kMode, {K::kUnits, K::kTiles}));
  static_assert(K::kBackwardBytes <= 48 << 10, "more would have to be asked for");
  const Grid grid = grid_of(plan, problem.shape, K::kBackwardBytes);
  const std::string name = what("backward", plan);
  const bool clips = problem.limit > 0;
  if (problem.gamma != nullptr) {
    if (clips) return start_one<backward_in_block<K, true, true>>(problem, grid, stream, name);
    return start_one<backward_in_block<K, true, false>>(problem, grid, stream, name);
  }
  if (clips) return start_one<backward_in_block<K, false, true>>(problem, grid, stream, name);
  start_one<backward_in_block<K, false, false>>(problem, grid, stream, name);
}

// Calls with(Kernel<i>) of the plan's configuration.
template <class With, std::size_t... kIndices>
void choose(const Plan& plan, With with, std::index_sequence<kIndices...>) {
  const bool found = ((kConfigurations[kIndices].units == plan.configuration.units
                           ? (with(std::integral_constant<int, kIndices>{}), true)
                           : false) ||
                      ...);
  if (!found) throw std::runtime_error(what("", plan) + ": there is no kernel for it");
}

using Indices = std::make_index_sequence<std::size(kConfigurations)>;

}  // namespace

void single_block_forward(const Plan& plan, const Forward& problem, const Stream& stream) {
  choose(plan, [&](auto i) { forward_of<Kernel<i>>(plan, problem, stream); }, Indices{});
}

void single_block_backward(const Plan& plan, const Backward& problem, const Stream& stream) {
  choose(plan, [&](auto i) { backward_of<Kernel<i>>(plan, problem, stream); }, Indices{});
}

std::string unusable(int device) {
  return why_not(reinterpret_cast<const void*>(&cuda::measure<Type::Stored>), device);
}

void measure(const Measured& problem, const Stream& stream) {
  constexpr std::size_t kShared = kMeasureWarps * sizeof(Row);
  const int directions = problem.shape.groups / problem.shape.heads;
  const Grid grid = {problem.shape.steps, directions, 32 * kMeasureWarps, kShared};
  start_one<cuda::measure<Type::Stored>>(problem, grid, stream,
                                         std::string("kernel measure, ") + kName);
}

}  // namespace rnnfast::cuda::RNNFAST_MODE
