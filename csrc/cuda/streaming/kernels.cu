// The streaming kernels (product.cuh) of one mode: RNNFAST_MODE is its name, RNNFAST_MODE_TYPE
// its type. Compiled once for each, and by the host's compiler for the emulation.
#include <string>
#include <utility>

#include "cuda/host/launch.h"
#include "cuda/host/start.cuh"
#include "cuda/streaming/backward.cuh"
#include "cuda/streaming/forward.cuh"

namespace rnnfast::cuda::RNNFAST_MODE::streaming {
namespace {

using namespace cuda::streaming;
using Type = RNNFAST_MODE_TYPE;
constexpr Mode kMode = RNNFAST_MODE_VALUE;

int up(int number, int of) { return (number + of - 1) / of; }

// A pass on a stream: its launches, with an error that names them.
struct Launches {
  const Plan& plan;
  const Shape& shape;
  const Stream& stream;
  const char* pass;

  template <auto kKernel, class Arguments>
  void start(int blocks, int bytes, const Arguments& arguments) const {
    const Grid grid = {blocks, shape.groups, kThreads, static_cast<std::size_t>(bytes), 1};
    cuda::start<kKernel>(arguments, grid, stream, [this] {
      return std::string("kernel ") + pass + " of " RNNFAST_NAME(RNNFAST_MODE) ", of the plan \"" +
             text(plan) + "\"";
    });
  }
};

Workspace workspace_of(const Plan& plan, const Shape& shape, void* base) {
  return Workspace(base, kMode, shape.groups, up(shape.size, kTileUnits), plan.slices);
}

template <bool kTransposed>
void pack(const Launches& launches, const void* w_hh, const Workspace& w) {
  const int warps = w.tiles * w.tiles * (kTileUnits / Type::kDepth);
  launches.start<pack_kernel<Type, kTransposed>>(up(warps, kWarps), 0,
                                                 Packed{w_hh, launches.shape, w});
}

// Calls with(Block), the one of the plan.
template <class With, std::size_t... kIndices>
void choose(const Plan& plan, With with, std::index_sequence<kIndices...>) {
  bool found = false;
  const auto one = [&](auto block) {
    using K = decltype(block);
    if (K::kTiles != plan.streamed.tiles || K::kSlices != plan.streamed.slices) return;
    found = true;
    with(block);
  };
  (one(Block<Type, kStreamedBlocks[kIndices].tiles, kStreamedBlocks[kIndices].slices>{}), ...);
  if (!found) throw std::runtime_error("the plan \"" + text(plan) + "\": there is no such kernel");
}

template <class With>
void choose(const Plan& plan, With with) {
  choose(plan, with, std::make_index_sequence<streamed_blocks(kMode)>{});
}

template <class K>
int blocks_of(const Workspace& w) {
  return up(w.tiles, K::kTiles) * up(w.slices, K::kSlices);
}

// Tiles of a block that has one for each warp. With fewer blocks a slice's sums are read less
// often, but every multiprocessor should have a block.
int strip_of(const Workspace& w, int groups) {
  constexpr int kEnough = 256;  // blocks
  int tiles = kWarps;
  while (tiles < 4 * kWarps && up(w.tiles, 2 * tiles) * w.slices * groups >= kEnough) tiles *= 2;
  return tiles;
}

int strips(const Workspace& w, int tiles) { return up(w.tiles, tiles) * w.slices; }

}  // namespace

void forward(const Plan& plan, const Forward& problem, const Stream& stream) {
  const Launches launches = {plan, problem.shape, stream, "forward"};
  const Workspace w = workspace_of(plan, problem.shape, problem.workspace);
  Step<Forward> step = {problem, w, 0, strip_of(w, problem.shape.groups)};
  pack<false>(launches, problem.w_hh, w);
  launches.start<begin_kernel<Type>>(strips(w, step.tiles), 0, step);
  choose(plan, [&](auto block) {
    using K = decltype(block);
    for (; step.i < problem.shape.steps; ++step.i) {
      launches.start<forward_kernel<K>>(blocks_of<K>(w), K::kBytes, step);
      if (problem.gamma == nullptr) continue;
      launches.start<finish_forward_kernel<Type>>(strips(w, step.tiles), kFinishBytes, step);
    }
  });
}

// One launch more than there are steps: the last one makes dh_0.
void backward(const Plan& plan, const Backward& problem, const Stream& stream) {
  const Launches launches = {plan, problem.shape, stream, "backward"};
  const Workspace w = workspace_of(plan, problem.shape, problem.workspace);
  Step<Backward> step = {problem, w, 0, strip_of(w, problem.shape.groups)};
  pack<true>(launches, problem.w_hh, w);
  const bool finish = problem.gamma != nullptr || problem.clip > 0;
  choose(plan, [&](auto block) {
    using K = decltype(block);
    for (; step.i <= problem.shape.steps; ++step.i) {
      if (step.i == problem.shape.steps && problem.dh_0 == nullptr) break;
      launches.start<backward_kernel<K>>(blocks_of<K>(w), K::kBytes, step);
      if (!finish || step.i == problem.shape.steps) continue;
      launches.start<finish_backward_kernel<Type>>(strips(w, step.tiles), kFinishBytes, step);
    }
  });
}

}  // namespace rnnfast::cuda::RNNFAST_MODE::streaming
