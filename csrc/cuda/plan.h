// Which kernel serves a problem on a device, and how it is cut up: pure functions of numbers, which
// need no GPU. Times are estimates from published latencies until a GPU has said otherwise.
#pragma once

#include <string>

namespace rnnfast::cuda {

enum class Mode { kBFloat16, kFloat16, kTf32, kExact };  // fragments.cuh

struct Device {
  std::string name;
  int capability = 0;  // 10 major + minor
  int multiprocessors = 0;
  int shared_memory = 0;  // bytes a block may have
};

struct Size {
  int units = 0;   // of a group: H / heads
  int groups = 0;  // directions times heads
  int rows = 0;    // of the batch
  Mode mode = Mode::kBFloat16;
  bool norm = false;
};

// What a single block is compiled for.
struct Configuration {
  int units;  // of a group, padded
  int tiles;  // of 16 units, of a warp

  constexpr int warps() const { return units / (16 * tiles); }
};

// The first that has room for a group serves it. More tiles a warp: fewer warps that read the
// state, and weights that are no longer in the registers of so many threads.
constexpr Configuration kHalfConfigurations[] = {{32, 1}, {64, 1}, {128, 1}, {256, 2}};
constexpr Configuration kSingleConfigurations[] = {{32, 1}, {64, 1}, {128, 1}};

template <Mode kMode>
constexpr const auto& configurations_of() {
  if constexpr (kMode == Mode::kTf32 || kMode == Mode::kExact) {
    return kSingleConfigurations;
  } else {
    return kHalfConfigurations;
  }
}

// Of a tile of the state in shared memory, in words; of a product, instructions and units deep.
constexpr int tile_words(Mode mode) {
  return mode == Mode::kTf32 ? 128 : mode == Mode::kExact ? 192 : 64;
}
constexpr int products(Mode mode) { return mode == Mode::kExact ? 6 : 1; }
constexpr int depth(Mode mode) { return mode == Mode::kTf32 ? 8 : 16; }
constexpr int weight_registers(Mode mode, const Configuration& c) {
  return c.tiles * c.units / depth(mode) * (mode == Mode::kExact ? 12 : 4);
}

// Bytes of shared memory of a block, as SingleBlock has them.
constexpr int forward_bytes(Mode mode, const Configuration& c) {
  return 2 * c.units / 16 * tile_words(mode) * 4 + 2 * c.units * 4 + c.warps() * 2 * 8 * 4;
}
constexpr int backward_bytes(Mode mode, const Configuration& c) {
  const int kept = c.units * 8 * 4;
  return forward_bytes(mode, c) + c.warps() * 3 * 8 * 4 + kept;
}

struct Plan {
  std::string refused;  // why there is none; the rest says nothing then
  Configuration configuration = {};
  int columns = 8;  // rows of the batch of a block
  int slices = 0;   // of the batch: blocks of a group
  int blocks = 0;
  int threads = 0;
  int weight_registers = 0;  // of a thread
  int shared = 0;            // bytes of a block, of the larger of the two passes
  double cycles = 0;         // of a step of forward
  double step = 0;           // microseconds of it, all blocks having had theirs
};

Plan plan(const Size& size, const Device& device);
std::string text(const Plan& plan);

}  // namespace rnnfast::cuda
