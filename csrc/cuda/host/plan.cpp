#include "cuda/host/plan.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <limits>
#include <vector>

#include "cuda/streaming/workspace.h"

namespace rnnfast::cuda {
namespace {

constexpr int kOldest = 80;
constexpr int kOldestWithClusters = 90;
constexpr int kMostGroups = 65535;  // blocks of a grid in y
constexpr std::int64_t kMostBlocks = std::numeric_limits<int>::max();
constexpr double kMegahertz = 1700;
constexpr double kFlight = 230;  // cycles from a store into another block to the end of its wait
constexpr double kIngress = 20;  // bytes a cycle that a block receives; not measured yet
constexpr double kFromL2 = 32;   // bytes a cycle from L2 into a multiprocessor; not measured yet
constexpr double kFromMemory = 15;
constexpr double kL2 = 40e6;        // bytes that it holds
constexpr double kLaunched = 1500;  // cycles from the end of a launch to the first load of the next
constexpr double kBegun = 1500;     // cycles of a block without its product
constexpr double kDispatched = 2.2;  // microseconds that the host takes for a launch

// number / of, rounded up; both are 0 or more.
std::int64_t up(std::int64_t number, std::int64_t of) { return (number + of - 1) / of; }

// A product takes 6.26 cycles of one of four tensor cores, shared memory gives 128 bytes a cycle;
// the rest of a step, latencies above all, is fitted to the model of the machine code (tests/sass).
double cycles_of(const Size& size, const Configuration& c, int columns) {
  const double tiles = c.units / 16.0, of_block = tiles / c.blocks;
  const double state = tiles * tile_words(size.mode) * 4;  // bytes
  const double tensor = of_block * c.units / depth(size.mode) * products(size.mode) * 6.26 / 4;
  const double read = (c.bands() * state + shared_weight_bytes(size.mode, c)) / 128;
  const bool exact = size.mode == Mode::kExact, tf32 = size.mode == Mode::kTf32;
  const double rest = exact ? 1080 : !tf32 ? 460 : c.blocks == 1 ? 760 : 590;
  double cycles = rest + std::max((exact ? 1.4 : 1.3) * tensor, read) + partial_bytes(c) / 128.0;
  if (c.blocks == 1) return cycles + (size.norm ? 480 + 50 * c.warps() : 0);
  if (size.norm) cycles += 600 + kFlight + 4 * c.blocks * c.owners();
  return cycles + kFlight + state * columns / 8 / kIngress;
}

bool fits(const Size& size, const Configuration& c, const Device& device) {
  return size.units <= c.units && backward_bytes(size.mode, c) <= device.shared_memory;
}

// The number of blocks, or clusters, of a configuration that run at the same time.
int at_once(Mode mode, const Configuration& c, const Device& device) {
  if (c.blocks == 1) {  // registers limit it: about 120 a thread beside the weights
    const int registers = (120 + weight_registers(mode, c)) * 32 * c.warps();
    return device.multiprocessors * std::clamp((64 << 10) / registers, 1, 8);
  }
  const auto size = std::find(std::begin(kClusterSizes), std::end(kClusterSizes), c.blocks);
  const bool has = device.capability >= kOldestWithClusters;
  return has ? device.clusters[size - std::begin(kClusterSizes)] : 0;
}

// A launch of the streaming kernel: a block loads every byte from L2, or W from memory if W does
// not fit into L2.
double cycles_of(const Size& size, const StreamedBlock& block, double tiles, double turns) {
  const int steps = 16 / depth(size.mode);
  const double of_tile = 4.0 * steps * 32 * weight_words(size.mode);
  const double rate = size.groups * tiles * tiles * of_tile > kL2 ? kFromMemory : kFromL2;
  const double bytes =
      tiles * (block.tiles * of_tile * kFromL2 / rate + 4.0 * block.slices * tile_words(size.mode));
  const double tensor = block.tiles * block.slices * tiles * steps * products(size.mode) * 6.26 / 4;
  return kLaunched + turns * (kBegun + std::max(bytes / kFromL2, 1.2 * tensor));
}

void add(const Size& size, const Device& device, Family family, const Configuration& c,
         const Wanted& wanted, std::vector<Plan>& to) {
  const int most = at_once(size.mode, c, device);
  if (most == 0 || !fits(size, c, device)) return;
  if (wanted.blocks != 0 && wanted.blocks != c.blocks) return;
  if (wanted.units != 0 && wanted.units != c.units) return;
  for (int columns = 8; columns > 0; --columns) {
    if (wanted.columns > 0 && wanted.columns != columns) continue;
    const std::int64_t slices = up(size.rows, columns);
    const std::int64_t clusters = std::max<std::int64_t>(slices, 1) * size.groups;
    if (clusters * c.blocks > kMostBlocks) continue;
    Plan plan;
    plan.mode = size.mode;
    plan.family = family;
    plan.configuration = c;
    plan.columns = columns;
    plan.slices = static_cast<int>(slices);
    plan.blocks = static_cast<int>(clusters * c.blocks);
    plan.threads = 32 * c.warps();
    plan.weight_registers = weight_registers(size.mode, c);
    plan.shared = backward_bytes(size.mode, c);
    plan.cycles = cycles_of(size, c, columns);
    plan.step = static_cast<double>(up(clusters, most)) * plan.cycles / kMegahertz;
    to.push_back(plan);
  }
}

void add(const Size& size, const Device& device, const StreamedBlock& block, const Wanted& wanted,
         std::vector<Plan>& to) {
  if (wanted.blocks != 0 && wanted.blocks != kStreaming) return;
  if (wanted.units != 0 && wanted.units != 16 * block.tiles) return;
  if (wanted.columns > 0 && wanted.columns != 8 * block.slices) return;
  const std::int64_t tiles = up(size.units, 16), slices = up(size.rows, 8);
  const std::int64_t blocks =
      up(tiles, block.tiles) * std::max<std::int64_t>(up(slices, block.slices), 1);
  // The kernels beside the product have one block a tile and slice, or two blocks a pair of tiles.
  const std::int64_t most = std::max({blocks, tiles * slices, tiles * tiles * 2}) * size.groups;
  if (most > kMostBlocks) return;
  Plan plan;
  plan.mode = size.mode;
  plan.family = Family::kStreaming;
  plan.streamed = block;
  plan.configuration.units = static_cast<int>(16 * tiles);
  plan.columns = 8 * block.slices;
  plan.slices = static_cast<int>(slices);
  plan.blocks = static_cast<int>(blocks * size.groups);
  plan.threads = kStreamedThreads;
  plan.shared = streamed_bytes(block);
  plan.workspace =
      streaming::WorkspaceWords(size.mode, size.groups, static_cast<int>(tiles), plan.slices)
          .bytes();
  const double turns = static_cast<double>(up(plan.blocks, device.multiprocessors));
  plan.cycles = cycles_of(size, block, tiles, turns);
  plan.step = std::max(plan.cycles / kMegahertz, kDispatched) + (size.norm ? kDispatched : 0);
  to.push_back(plan);
}

}  // namespace

std::span<const Configuration> configurations(Mode mode, Family family) {
  if (family == Family::kStreaming) return {};
  const bool block = family == Family::kSingleBlock;
  if (mode == Mode::kTf32 || mode == Mode::kExact) {
    if (block) return kSingleBlocks;
    if (mode == Mode::kTf32) return kTf32Clusters;
    return kExactClusters;
  }
  if (block) return kHalfBlocks;
  return kHalfClusters;
}

std::vector<Plan> plans(const Size& size, const Device& device, const Wanted& wanted) {
  std::vector<Plan> found;
  for (Family family : {Family::kSingleBlock, Family::kCluster}) {
    for (const Configuration& c : configurations(size.mode, family)) {
      add(size, device, family, c, wanted, found);
    }
  }
  for (int i = 0; i < streamed_blocks(size.mode); ++i) {
    add(size, device, kStreamedBlocks[i], wanted, found);
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Plan& a, const Plan& b) { return a.step < b.step; });
  return found;
}

Plan plan(const Size& size, const Device& device, const Wanted& wanted) {
  Plan refused;
  if (device.capability < kOldest) {
    refused.refused = "it needs compute capability 8.0, and " + device.name + " has " +
                      std::to_string(device.capability / 10) + "." +
                      std::to_string(device.capability % 10);
    return refused;
  }
  if (size.groups > kMostGroups) {
    refused.refused = std::to_string(size.groups) + " heads and directions are more than the " +
                      std::to_string(kMostGroups) + " of one launch";
    return refused;
  }
  std::vector<Plan> found = plans(size, device, wanted);
  if (!found.empty()) return found.front();
  const bool any = wanted.blocks == 0 && wanted.columns == 0;
  refused.refused = std::string(any ? "" : "RNNFAST_CUDA_KERNEL and RNNFAST_CUDA_COLUMNS name ") +
                    (any ? "there is no kernel for " : "none that can run ") +
                    std::to_string(size.units) + " units a head and " + std::to_string(size.rows) +
                    " rows on " + device.name;
  return refused;
}

Wanted wanted(const Plan& plan) {
  const bool streams = plan.family == Family::kStreaming;
  return {streams ? kStreaming : plan.configuration.blocks, plan.columns,
          streams ? 16 * plan.streamed.tiles : plan.configuration.units};
}

std::string text(const Plan& plan) {
  if (!plan.refused.empty()) return plan.refused;
  const Configuration& c = plan.configuration;
  char words[320];
  if (plan.family == Family::kStreaming) {
    std::snprintf(words, sizeof words,
                  "streaming: a launch a step, %d blocks of %d threads (%d units by %d rows), %.1f "
                  "MiB of memory, %.2f us a step of forward (estimated)",
                  plan.blocks, plan.threads, 16 * plan.streamed.tiles, plan.columns,
                  static_cast<double>(plan.workspace) / (1 << 20), plan.step);
    return words;
  }
  std::snprintf(
      words, sizeof words,
      "%s: %d units by %d rows, %d blocks of %d threads, weights in %d registers of each"
      "%s, %.1f KiB of shared memory, %.2f us a step of forward (estimated)",
      c.blocks == 1 ? "single block" : ("clusters of " + std::to_string(c.blocks)).c_str(), c.units,
      plan.columns, plan.blocks, plan.threads, plan.weight_registers,
      c.shared_products > 0 ? " and in shared memory" : "", plan.shared / 1024.0, plan.step);
  return words;
}

}  // namespace rnnfast::cuda
