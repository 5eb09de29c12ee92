#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <limits>

namespace rnnfast::cuda {
namespace {

constexpr int kOldest = 80;
constexpr int kOldestWithClusters = 90;
constexpr int kMostGroups = 65535;  // blocks of a grid in y
constexpr double kMegahertz = 1700;
constexpr double kFlight = 230;  // cycles of a store into another block, and of waking up for it
constexpr double kIngress = 20;  // bytes a cycle that come into a block, until it is measured

// A product takes 6.26 cycles of one of four tensor cores, shared memory gives 128 bytes a cycle;
// the rest of a step, latencies above all, is fitted to the model of the machine code (tests/sass).
double cycles_of(const Size& size, const Configuration& c, int columns) {
  const double tiles = c.units / 16.0, of_block = tiles / c.blocks;
  const double state = tiles * tile_words(size.mode) * 4;  // bytes
  const double tensor = of_block * c.units / depth(size.mode) * products(size.mode) * 6.26 / 4;
  const double read = (c.bands() * state + staged_bytes(size.mode, c)) / 128;
  const bool exact = size.mode == Mode::kExact, tf32 = size.mode == Mode::kTf32;
  const double rest = exact ? 850 : !tf32 ? 460 : c.blocks == 1 ? 560 : 450;
  double cycles = rest + std::max((exact ? 1.4 : 1.3) * tensor, read) + partial_bytes(c) / 128.0;
  if (c.blocks == 1) return cycles + (size.norm ? 480 + 70 * c.warps() : 0);
  if (size.norm) cycles += 670 + kFlight + 7 * c.blocks * c.owners();
  return cycles + kFlight + state * columns / 8 / kIngress;
}

bool fits(const Size& size, const Configuration& c, const Device& device) {
  return size.units <= c.units && backward_bytes(size.mode, c) <= device.shared_memory;
}

// How many of a configuration's blocks, or clusters, are there at once.
int at_once(const Configuration& c, const Device& device) {
  if (c.blocks == 1) return device.multiprocessors;
  const auto size = std::find(std::begin(kClusterSizes), std::end(kClusterSizes), c.blocks);
  const bool has = device.capability >= kOldestWithClusters;
  return has ? device.clusters[size - std::begin(kClusterSizes)] : 0;
}

std::string most_units(const Size& size, const Device& device) {
  int most = 0;
  for (Family family : {Family::kSingleBlock, Family::kCluster}) {
    for (const Configuration& c : configurations(size.mode, family)) {
      if (at_once(c, device) > 0 && backward_bytes(size.mode, c) <= device.shared_memory) {
        most = std::max(most, c.units);
      }
    }
  }
  return std::to_string(most);
}

}  // namespace

std::span<const Configuration> configurations(Mode mode, Family family) {
  const bool block = family == Family::kSingleBlock;
  if (mode == Mode::kTf32 || mode == Mode::kExact) {
    if (block) return kSingleBlocks;
    if (mode == Mode::kTf32) return kTf32Clusters;
    return kExactClusters;
  }
  if (block) return kHalfBlocks;
  return kHalfClusters;
}

Plan plan(const Size& size, const Device& device, const Wanted& wanted) {
  Plan best;
  if (device.capability < kOldest) {
    best.refused = "it needs compute capability 8.0, and " + device.name + " has " +
                   std::to_string(device.capability / 10) + "." +
                   std::to_string(device.capability % 10);
    return best;
  }
  if (size.groups > kMostGroups) {
    best.refused = std::to_string(size.groups) + " heads and directions are more than the " +
                   std::to_string(kMostGroups) + " of one launch";
    return best;
  }
  if (wanted.columns < 0 || wanted.columns > 8) {
    best.refused = "RNNFAST_CUDA_COLUMNS: given " + std::to_string(wanted.columns) +
                   ", wanted 1 to 8, or 0 for the plan's choice";
    return best;
  }
  for (Family family : {Family::kSingleBlock, Family::kCluster}) {
    for (const Configuration& c : configurations(size.mode, family)) {
      const int most = at_once(c, device);
      if (most == 0 || !fits(size, c, device)) continue;
      if (wanted.blocks > 0 && wanted.blocks != c.blocks) continue;
      for (int columns = 8; columns > 0; --columns) {
        if (wanted.columns > 0 && wanted.columns != columns) continue;
        const std::int64_t slices = (std::int64_t{size.rows} + columns - 1) / columns;
        const std::int64_t clusters = std::max<std::int64_t>(slices, 1) * size.groups;
        if (clusters * c.blocks > std::numeric_limits<int>::max()) continue;
        const double turns = static_cast<double>((clusters + most - 1) / most);
        const double cycles = cycles_of(size, c, columns), step = turns * cycles / kMegahertz;
        if (best.blocks > 0 && step >= best.step) continue;
        best.configuration = c;
        best.columns = columns;
        best.slices = static_cast<int>(slices);
        best.blocks = static_cast<int>(clusters * c.blocks);
        best.cycles = cycles;
        best.step = step;
      }
    }
  }
  if (best.blocks == 0 && wanted.blocks > 0) {
    best.refused = "RNNFAST_CUDA_BLOCKS: given " + std::to_string(wanted.blocks) +
                   ", which has no kernel for " + std::to_string(size.units) + " units a head on " +
                   device.name;
    return best;
  }
  if (best.blocks == 0) {
    best.refused = std::to_string(size.units) + " units a head are more than the " +
                   most_units(size, device) + " that " + device.name + " has room for";
    return best;
  }
  best.threads = 32 * best.configuration.warps();
  best.weight_registers = weight_registers(size.mode, best.configuration);
  best.shared = backward_bytes(size.mode, best.configuration);
  return best;
}

std::string text(const Plan& plan) {
  if (!plan.refused.empty()) return plan.refused;
  const Configuration& c = plan.configuration;
  char words[320];
  std::snprintf(
      words, sizeof words,
      "%s: %d units by %d rows, %d blocks of %d threads, weights in %d registers of each"
      "%s, %.1f KiB of shared memory, %.2f us a step of forward (estimated)",
      c.blocks == 1 ? "single block" : ("clusters of " + std::to_string(c.blocks)).c_str(), c.units,
      plan.columns, plan.blocks, plan.threads, plan.weight_registers,
      c.staged ? " and in shared memory" : "", plan.shared / 1024.0, plan.step);
  return words;
}

}  // namespace rnnfast::cuda
