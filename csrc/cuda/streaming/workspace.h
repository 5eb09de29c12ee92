// The memory of a streamed pass beside its tensors (product.cuh): its size and its parts.
#pragma once

#include <cstdint>

#include "cuda/host/plan.h"

namespace rnnfast::cuda::streaming {

// Sums of a tile and a column: two for clipping, two for layer norm, and for both together these
// last two again, of scaled-down values.
constexpr int kMostSums = 6;

// The sizes of its parts, in 32-bit words.
struct WorkspaceWords {
  std::int64_t weights, state, values, sums;

  WorkspaceWords(Mode mode, int groups, int tiles, int slices) {
    const std::int64_t all = std::int64_t{groups} * slices * tiles;
    const int steps = 16 / depth(mode);  // of a product, that go over a tile
    weights = std::int64_t{groups} * tiles * tiles * steps * 32 * weight_words(mode);
    state = 2 * all * tile_words(mode);
    values = all * 128;
    sums = all * kMostSums * 8;
  }
  std::int64_t bytes() const { return 4 * (weights + state + values + sums); }
};

struct Workspace {
  std::uint32_t* weights = nullptr;  // [group][tile][step of the product]: as factors
  std::uint32_t* state = nullptr;    // [half][group][slice][tile]: as factors
  float* values = nullptr;           // [group][slice][tile][lane][value]
  float* sums = nullptr;             // [group][slice][tile][sum][column]
  int tiles = 0;                     // of 16 units, of a group
  int slices = 0;                    // of 8 rows of the batch

  Workspace(void* base, Mode mode, int groups, int tiles, int slices)
      : tiles(tiles), slices(slices) {
    const WorkspaceWords words(mode, groups, tiles, slices);
    weights = static_cast<std::uint32_t*>(base);
    state = weights + words.weights;
    values = reinterpret_cast<float*>(state + words.state);
    sums = values + words.values;
  }
};

}  // namespace rnnfast::cuda::streaming
