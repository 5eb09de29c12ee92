// Which kernel runs a problem on a device, and how it is cut up: pure functions of numbers, which
// need no GPU. Times are estimates from published latencies; no GPU has confirmed them yet.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace rnnfast::cuda {

enum class Mode { kBFloat16, kFloat16, kTf32, kExact };  // device/fragments.cuh

// Blocks of a cluster; more than 8 only on devices that allow it.
constexpr int kClusterSizes[] = {2, 4, 8, 16};

struct Device {
  std::string name;
  int capability = 0;  // 10 major + minor
  int multiprocessors = 0;
  int shared_memory = 0;          // bytes a block may have
  std::array<int, 4> clusters{};  // how many of each size can be resident at once
};

struct Size {
  int units = 0;   // of a group: H / heads
  int groups = 0;  // directions times heads
  int rows = 0;    // of the batch
  Mode mode = Mode::kBFloat16;
  bool norm = false;
};

// Choices that a caller makes instead of the plan; 0: the plan chooses.
constexpr int kStreaming = -1;
struct Wanted {
  int blocks = 0;  // of a cluster, 1 for a single block, or kStreaming
  int columns = 0;
  int units = 0;  // of the configuration, or of a streaming block
};

// The sizes that a resident kernel is compiled for: the arguments of Kernel (resident/kernel.cuh).
struct Configuration {
  int units;  // of a group, padded
  int tiles;  // of 16 units, that a warp multiplies
  int blocks = 1;
  int parts = 1;            // of the state, a warp for each
  int shared_products = 0;  // of a warp, with weights in shared memory instead of registers

  constexpr int bands() const { return units / (16 * tiles * blocks); }
  constexpr int warps() const { return bands() * parts; }
  constexpr int owned() const { return (tiles + parts - 1) / parts; }  // tiles
  constexpr int owners() const { return bands() * tiles / owned(); }   // warps
};

// More tiles a warp: fewer warps that read the state, and weights that are no longer in the
// registers of so many threads. More parts: fewer weights a thread, and sums to be added up.
constexpr Configuration kHalfBlocks[] = {{32, 1}, {64, 1}, {128, 1}, {256, 2, 1, 1, 2}};
constexpr Configuration kSingleBlocks[] = {{32, 1}, {64, 1}, {128, 1}};
constexpr Configuration kHalfClusters[] = {
    {256, 2, 2, 4},      {256, 2, 4, 4},       {512, 2, 4, 2},  {512, 2, 8, 4},
    {512, 2, 16, 4},     {768, 3, 8, 4, 9},    {768, 3, 16, 8}, {1024, 2, 8, 2, 36},
    {1024, 2, 16, 4, 4}, {1280, 5, 16, 8, 25},
#ifdef RNNFAST_EMULATION  // where large ones take long
    {64, 2, 2, 2},       {64, 1, 4},           {128, 1, 8},     {256, 1, 16},
#endif
};
constexpr Configuration kTf32Clusters[] = {
    {256, 2, 4, 4},   {512, 2, 8, 4, 2}, {512, 2, 16, 8}, {768, 3, 16, 8, 6}, {1024, 4, 16, 8, 32},
#ifdef RNNFAST_EMULATION
    {64, 2, 2, 2, 1}, {64, 1, 4},        {128, 1, 8},
#endif
};
constexpr Configuration kExactClusters[] = {
    {256, 2, 4, 4},   {512, 2, 8, 4, 10}, {512, 2, 16, 8}, {768, 3, 16, 8, 10},
#ifdef RNNFAST_EMULATION
    {64, 2, 2, 2, 1}, {64, 1, 4},         {128, 1, 8},
#endif
};

// A block of the streaming kernel multiplies tiles of 16 units with slices of 8 rows of the batch.
struct StreamedBlock {
  int tiles, slices;
};
constexpr int kStreamedThreads = 256;
constexpr StreamedBlock kStreamedBlocks[] = {{1, 1}, {2, 1}, {1, 2}, {1, 4}, {2, 4}, {4, 8}};
// In exact mode the largest block has too few registers for its sums.
constexpr int streamed_blocks(Mode mode) { return mode == Mode::kExact ? 5 : 6; }

constexpr int streamed_bytes(const StreamedBlock& b) {  // of shared memory
  const int together = b.tiles * b.slices < 8 ? b.tiles * b.slices : 8;
  return kStreamedThreads / 32 * together * 32 * 16;
}

// kStreaming has no configurations: it runs every size.
enum class Family { kSingleBlock, kCluster, kStreaming };

template <Mode kMode, Family kFamily>
constexpr const auto& configurations_of() {
  constexpr bool kHalf = kMode == Mode::kBFloat16 || kMode == Mode::kFloat16;
  if constexpr (kFamily == Family::kSingleBlock) {
    if constexpr (kHalf) {
      return kHalfBlocks;
    } else {
      return kSingleBlocks;
    }
  } else if constexpr (kHalf) {
    return kHalfClusters;
  } else if constexpr (kMode == Mode::kTf32) {
    return kTf32Clusters;
  } else {
    return kExactClusters;
  }
}

std::span<const Configuration> configurations(Mode mode, Family family);

// Words of a tile of the state in shared memory; instructions of a product, and its depth in units.
constexpr int tile_words(Mode mode) {
  return mode == Mode::kTf32 ? 128 : mode == Mode::kExact ? 192 : 64;
}
constexpr int products(Mode mode) { return mode == Mode::kExact ? 6 : 1; }
constexpr int depth(Mode mode) { return mode == Mode::kTf32 ? 8 : 16; }
constexpr int steps_of_product(Mode mode, const Configuration& c) {
  return c.units / depth(mode) / c.parts;
}
constexpr int weight_words(Mode mode) { return mode == Mode::kExact ? 12 : 4; }
constexpr int weight_registers(Mode mode, const Configuration& c) {
  return (c.tiles * steps_of_product(mode, c) - c.shared_products) * weight_words(mode);
}
constexpr int shared_weight_bytes(Mode mode, const Configuration& c) {
  return c.warps() * c.shared_products * 32 * weight_words(mode) * 4;
}
constexpr int partial_bytes(const Configuration& c) {
  return c.parts > 1 ? c.warps() * c.tiles * 32 * 4 * 4 : 0;
}

// Bytes of shared memory of a block; Kernel has the same numbers, asserted in instances.cuh.
constexpr int forward_bytes(Mode mode, const Configuration& c) {
  const int barriers = c.blocks > 1 ? 48 : 0, sums = c.blocks * c.owners() * 8 * 2 * 4;
  return 2 * c.units / 16 * tile_words(mode) * 4 + shared_weight_bytes(mode, c) + partial_bytes(c) +
         2 * c.units / c.blocks * 4 + sums + barriers;
}
constexpr int backward_bytes(Mode mode, const Configuration& c) {
  const int kept = 2 * c.owned() * 4 * 32 * c.owners() * 4,
            sums = c.blocks * c.owners() * 8 * 4 * 4;
  return forward_bytes(mode, c) + sums + 128 + kept;
}

struct Plan {
  std::string refused;  // why there is no plan; then the rest means nothing
  Mode mode = Mode::kBFloat16;
  Family family = Family::kSingleBlock;
  Configuration configuration = {};
  StreamedBlock streamed = {};  // of the streaming family
  int columns = 8;              // rows of the batch that a block, or a cluster, takes
  int slices = 0;               // of the batch, each with sums of its own
  int blocks = 0;
  int threads = 0;
  int weight_registers = 0;    // of a thread
  int shared = 0;              // bytes of a block, of the larger of the two passes
  std::int64_t workspace = 0;  // bytes of memory beside the tensors
  double cycles = 0;           // of a step of forward
  double step = 0;             // microseconds until all blocks have done a step of forward
};

// All plans for a size, the fastest first by estimate; and the first of them, or why there is none.
std::vector<Plan> plans(const Size& size, const Device& device, const Wanted& wanted = {});
Plan plan(const Size& size, const Device& device, const Wanted& wanted = {});
Wanted wanted(const Plan& plan);  // names the plan
std::string text(const Plan& plan);

}  // namespace rnnfast::cuda
