#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <span>

namespace rnnfast::cuda {
namespace {

constexpr int kOldest = 80;
constexpr int kMostGroups = 65535;  // blocks of a grid in y
constexpr double kMegahertz = 1700;

std::span<const Configuration> configurations(Mode mode) {
  if (mode == Mode::kTf32 || mode == Mode::kExact) return kSingleConfigurations;
  return kHalfConfigurations;
}

// A product takes 6.26 cycles of one of four tensor cores, shared memory gives 128 bytes a cycle;
// the rest of a step, latencies above all, is fitted to the model of the machine code (tests/sass).
double cycles_of(const Size& size, const Configuration& c) {
  const double tiles = c.units / 16.0;
  const double tensor = tiles * c.units / depth(size.mode) * products(size.mode) * 6.26 / 4;
  const double read = c.warps() * tiles * tile_words(size.mode) * 4 / 128;
  const double rest = size.mode == Mode::kExact ? 790 : size.mode == Mode::kTf32 ? 670 : 520;
  return rest + 1.3 * std::max(tensor, read) + (size.norm ? 560 + 65 * c.warps() : 0);
}

}  // namespace

Plan plan(const Size& size, const Device& device) {
  Plan found;
  const auto all = configurations(size.mode);
  if (device.capability < kOldest) {
    found.refused = "it needs compute capability 8.0, and " + device.name + " has " +
                    std::to_string(device.capability / 10) + "." +
                    std::to_string(device.capability % 10);
    return found;
  }
  const auto fits = [&](const Configuration& c) { return size.units <= c.units; };
  const auto chosen = std::find_if(all.begin(), all.end(), fits);
  if (chosen == all.end()) {
    found.refused = std::to_string(size.units) + " units a head are more than the " +
                    std::to_string(all.back().units) + " that one block has room for";
    return found;
  }
  found.configuration = *chosen;
  found.shared = backward_bytes(size.mode, *chosen);
  if (found.shared > device.shared_memory) {
    found.refused = "a block needs " + std::to_string(found.shared) +
                    " bytes of shared memory, and " + device.name + " has " +
                    std::to_string(device.shared_memory);
    return found;
  }
  if (size.groups > kMostGroups) {
    found.refused = std::to_string(size.groups) + " heads and directions are more than the " +
                    std::to_string(kMostGroups) + " of one launch";
    return found;
  }
  found.slices = (size.rows + found.columns - 1) / found.columns;
  found.blocks = found.slices * size.groups;
  found.threads = 32 * chosen->warps();
  found.weight_registers = weight_registers(size.mode, *chosen);
  found.cycles = cycles_of(size, *chosen);
  const int turns = (found.blocks + device.multiprocessors - 1) / device.multiprocessors;
  found.step = std::max(turns, 1) * found.cycles / kMegahertz;
  return found;
}

std::string text(const Plan& plan) {
  if (!plan.refused.empty()) return plan.refused;
  char words[256];
  std::snprintf(
      words, sizeof words,
      "single block: %d units by %d rows a block, %d blocks of %d threads, weights in %d "
      "registers of each, %.1f KiB of shared memory, %.2f us a step of forward (estimated)",
      plan.configuration.units, plan.columns, plan.blocks, plan.threads, plan.weight_registers,
      plan.shared / 1024.0, plan.step);
  return words;
}

}  // namespace rnnfast::cuda
