// The streaming kernels: a launch for each time step, for any shape on any GPU. The end of a launch
// orders it before the next. W_hh and the state (two halves) are in memory, as factors of a
// product, each in the order in which lanes read it: no load is wasted, and the loop checks
// nothing.
//
// A block multiplies some tiles (16 units) with some slices (8 rows of the batch). Its warps share
// the units that the product goes over, and then the tiles of the result, eight at a time. The rest
// of a step is a warp's own, a tile each. If it needs sums over all units (layer norm, clipping) a
// second launch finishes the step: the first leaves the values and each tile's sums in memory.
#pragma once

#include "cuda/device/math.cuh"
#include "cuda/device/norms.cuh"
#include "cuda/device/place.cuh"
#include "cuda/device/rt.cuh"
#include "cuda/problem.h"
#include "cuda/streaming/workspace.h"

namespace rnnfast::cuda::streaming {

constexpr int kThreads = kStreamedThreads;
constexpr int kWarps = kThreads / 32;

// A warp that has one tile at a time.
template <class Mode_>
struct Tile {
  using Mode = Mode_;
  using Stored = typename Mode::Stored;
  static constexpr int kOwned = 1;
  static constexpr bool kScarce = false;
};

template <class Mode_, int kTiles_, int kSlices_>
struct Block : Tile<Mode_> {
  using Mode = Mode_;
  static constexpr int kTiles = kTiles_, kSlices = kSlices_;
  static constexpr int kAll = kTiles * kSlices;                   // tiles of the result
  static constexpr int kOfRound = kAll < kWarps ? kAll : kWarps;  // tiles, a warp for each
  static constexpr int kRounds = kAll / kOfRound;
  static constexpr int kStepWords = kTiles * Mode::kWeights + kSlices * Mode::kFactors;
  // Steps of the product whose factors are loaded together, while the warp multiplies the steps
  // before.
  static constexpr int kAhead = kStepWords > 24 ? 1 : kStepWords > 8 ? 2 : 4;
  static constexpr int kBytes = kWarps * kOfRound * 32 * 16;  // of shared memory
  static_assert(kRounds * kOfRound == kAll);
  static_assert(kBytes == streamed_bytes({kTiles, kSlices}));
};

template <class Problem>
struct Step {
  Problem problem;
  Workspace workspace;
  int i;      // in the order of the pass
  int tiles;  // of a block, in a second launch: a multiple of its warps
};

struct Packed {
  const void* w_hh;
  Shape shape;
  Workspace workspace;
};

// ------------------------------------------------------------------------------ places in memory

template <class Mode>
RT_DEVICE std::uint32_t* weights_of(const Workspace& w, int tile) {
  const int steps = w.tiles * (kTileUnits / Mode::kDepth);
  return w.weights + (std::int64_t{rt::block_y()} * w.tiles + tile) * steps * Mode::kWeights * 32;
}

// A slice's state of step i, all its tiles.
template <class Mode>
RT_DEVICE std::uint32_t* state_of(const Workspace& w, int i, int groups, int slice) {
  const std::int64_t of_half = std::int64_t{i % 2} * groups + rt::block_y();
  return w.state + (of_half * w.slices + slice) * w.tiles * Mode::kTileWords;
}

template <class K>
RT_DEVICE std::int64_t tile_of(const Workspace& w, const Place<K>& place) {
  return (std::int64_t{place.group} * w.slices + place.slice) * w.tiles + place.entry;
}

template <class K>
RT_DEVICE void put_values(const Workspace& w, const Place<K>& place, const float (&values)[1][4]) {
  std::uint32_t words[4];
  RT_UNROLL for (int v = 0; v < 4; ++v) words[v] = rt::bits_of(values[0][v]);
  rt::store(w.values + (tile_of(w, place) * 32 + place.lane) * 4, words);
}

template <class K>
RT_DEVICE void get_values(const Workspace& w, const Place<K>& place, float (&values)[1][4]) {
  std::uint32_t words[4];
  rt::read(w.values + (tile_of(w, place) * 32 + place.lane) * 4, words);
  RT_UNROLL for (int v = 0; v < 4; ++v) values[0][v] = rt::float_of(words[v]);
}

// A tile's sums: [number][column].
template <class K, int kNumber>
RT_DEVICE void put_sums(const Workspace& w, const Place<K>& place, int first,
                        const float (&sums)[kNumber][2]) {
  if (place.lane >= 4) return;
  float* to = w.sums + (tile_of(w, place) * kMostSums + first) * kColumns + place.lane * 2;
  RT_UNROLL for (int n = 0; n < kNumber; ++n) {
    RT_UNROLL for (int e = 0; e < 2; ++e) to[n * kColumns + e] = sums[n][e];
  }
}

// The state of tile and slice that the next step multiplies.
template <class K>
RT_DEVICE void put_state(const Workspace& w, int i, int groups, const Place<K>& place,
                         const TileWords<K>& words) {
  using Mode = typename K::Mode;
  std::uint32_t* tile = state_of<Mode>(w, i, groups, place.slice) + place.entry * Mode::kTileWords;
  Mode::write(place.lane, words[0], [tile](int to, const auto& what) {
    if constexpr (sizeof what == 8) {  // one store; from two words the compiler makes two
      const std::uint64_t high = what[1];
      *reinterpret_cast<std::uint64_t*>(tile + to) = what[0] | high << 32;
    } else {
      rt::store(tile + to, what);
    }
  });
}

// The tiles of a block that has several of one slice: the first tile, and the slice.
struct Strip {
  int tile, slice;

  RT_DEVICE Strip(const Workspace& w, int tiles) {
    const int across = (w.tiles + tiles - 1) / tiles;
    tile = rt::block_x() % across * tiles;
    slice = rt::block_x() / across;
  }
};

// Calls with(tile) for the tiles of a strip that belong to the warp.
template <class With>
RT_DEVICE void for_own_tiles(const Workspace& w, const Strip& strip, int tiles, With with) {
  for (int n = rt::thread() / 32; n < tiles && strip.tile + n < w.tiles; n += kWarps) {
    with(strip.tile + n);
  }
}

// Whether a tile and a slice exist; the last blocks have room for more.
RT_DEVICE bool there(const Workspace& w, int tile, int slice) {
  return tile < w.tiles && slice < w.slices;
}

// ------------------------------------------------------------------------------ the product

// Writes W_hh, or its transpose, as factors: a warp for each tile and step of the product. The end
// of this launch orders it before every product.
template <class Mode, bool kTransposed>
RT_KERNEL(kThreads)
pack_kernel(Packed packed) {
  using Stored = typename Mode::Stored;
  const Workspace& workspace = packed.workspace;
  const Shape& shape = packed.shape;
  const int steps = workspace.tiles * (kTileUnits / Mode::kDepth);
  const int lane = rt::thread() % 32, index = rt::block_x() * kWarps + rt::thread() / 32;
  const int tile = index / steps, step = index % steps;
  if (tile >= workspace.tiles) return;
  const std::int64_t size = shape.size;
  int row = tile * kTileUnits, column = step * Mode::kDepth / kTileUnits * kTileUnits;
  if (kTransposed) {
    const int swapped = row;
    row = column, column = swapped;
  }
  std::uint32_t a[Mode::kWeights];
  const Stored* w = static_cast<const Stored*>(packed.w_hh) + rt::block_y() * size * size;
  Mode::template weights<kTransposed>(a, w + row * size + column, size, shape.size - row,
                                      shape.size - column, lane, shape.paired, step);
  std::uint32_t* to = weights_of<Mode>(workspace, tile) + step * Mode::kWeights * 32 + lane * 4;
  RT_UNROLL for (int n = 0; n < Mode::kWeights; n += 4) {
    const std::uint32_t four[4] = {a[n], a[n + 1], a[n + 2], a[n + 3]};
    rt::store(to + n * 32, four);
  }
}

template <class K>
struct Factors {
  std::uint32_t weights[K::kTiles][K::Mode::kWeights];
  std::uint32_t state[K::kSlices][K::Mode::kFactors];
};

// The tiles of the result that a block has.
template <class K>
struct Corner {
  int tile, slice;

  RT_DEVICE explicit Corner(const Workspace& w) {
    const int across = (w.tiles + K::kTiles - 1) / K::kTiles;
    tile = rt::block_x() % across * K::kTiles;
    slice = rt::block_x() / across * K::kSlices;
  }
  RT_DEVICE int tile_of(int round) const { return tile + index(round) % K::kTiles; }
  RT_DEVICE int slice_of(int round) const { return slice + index(round) / K::kTiles; }

 private:
  // The warp's tile in a round.
  RT_DEVICE static int index(int round) { return round * K::kOfRound + rt::thread() / 32; }
};

// W times the state of step i: each of the first kOfRound warps gets the sums of its tiles
// (Corner).
template <class K>
RT_DEVICE void multiply(const Workspace& w, const Corner<K>& corner, int i, int groups,
                        float (&mine)[K::kRounds][4]) {
  using Mode = typename K::Mode;
  const int lane = rt::thread() % 32, warp = rt::thread() / 32;
  const int steps = w.tiles * (kTileUnits / Mode::kDepth);
  const int begin = steps * warp / kWarps, end = steps * (warp + 1) / kWarps;
  const std::uint32_t* weights[K::kTiles];
  const std::uint32_t* state[K::kSlices];
  RT_UNROLL for (int m = 0; m < K::kTiles;
                 ++m) {  // behind the last tile the last again: no warp uses it
    const int tile = corner.tile + m < w.tiles ? corner.tile + m : w.tiles - 1;
    weights[m] = weights_of<Mode>(w, tile) + lane * 4;
  }
  RT_UNROLL for (int n = 0; n < K::kSlices; ++n) {
    const int slice = corner.slice + n < w.slices ? corner.slice + n : w.slices - 1;
    state[n] = state_of<Mode>(w, i, groups, slice);
  }

  float sums[K::kTiles][K::kSlices][Mode::kSums][4] = {};
  Factors<K> factors[2][K::kAhead];
  const auto fetch = [&](int from, Factors<K>(&to)[K::kAhead]) {
    RT_UNROLL for (int a = 0; a < K::kAhead; ++a) {
      const int step = from + a;
      if (step >= end) {  // adds nothing
        to[a] = {};
        continue;
      }
      RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
        RT_UNROLL for (int k = 0; k < Mode::kWeights; k += 4) {
          std::uint32_t four[4];
          rt::read(weights[m] + (step * Mode::kWeights + k) * 32, four);
          RT_UNROLL for (int j = 0; j < 4; ++j) to[a].weights[m][k + j] = four[j];
        }
      }
      RT_UNROLL for (int n = 0; n < K::kSlices; ++n) {
        Mode::read(state[n], step, lane, to[a].state[n]);
      }
    }
  };
  const auto add = [&](const Factors<K>(&from)[K::kAhead]) {
    RT_UNROLL for (int a = 0; a < K::kAhead; ++a) {
      RT_UNROLL for (int n = 0; n < K::kSlices; ++n) {
        RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
          Mode::multiply(sums[m][n], from[a].weights[m], from[a].state[n]);
        }
      }
    }
  };
  fetch(begin, factors[0]);
  for (int step = begin; step < end; step += 2 * K::kAhead) {
    fetch(step + K::kAhead, factors[1]);
    add(factors[0]);
    fetch(step + 2 * K::kAhead, factors[0]);
    add(factors[1]);
  }

  const auto part = [&](int of_warp, int tile) {
    return reinterpret_cast<float*>(rt::shared()) +
           ((of_warp * K::kOfRound + tile) * 32 + lane) * 4;
  };
  RT_UNROLL for (int round = 0; round < K::kRounds; ++round) {
    RT_UNROLL for (int tile = 0; tile < K::kOfRound; ++tile) {
      const int index = round * K::kOfRound + tile;
      std::uint32_t four[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        four[v] = rt::bits_of(Mode::total(sums[index % K::kTiles][index / K::kTiles], v));
      }
      rt::store(part(warp, tile), four);
    }
    rt::sync_block();  // all warps write their parts, the tile's warp reads them
    RT_UNROLL for (int v = 0; v < 4; ++v) mine[round][v] = 0.0f;
    if (warp < K::kOfRound) {
      RT_UNROLL for (int p = 0; p < kWarps; ++p) {
        std::uint32_t four[4];
        rt::read(part(p, warp), four);
        RT_UNROLL for (int v = 0; v < 4; ++v) mine[round][v] += rt::float_of(four[v]);
      }
    }
    if (round + 1 < K::kRounds) rt::sync_block();  // the next round writes the same words
  }
}

// ------------------------------------------------------------------------------ sums of a launch

// Adds up over the threads of the block that have the same column (thread % 8); every lane gets the
// sums of its two columns. Uses shared memory from float `place` on, which the launch uses once.
template <int kNumber>
RT_DEVICE void over_block(float (&values)[kNumber], int place, float (&sums)[kNumber][2]) {
  const int lane = rt::thread() % 32, warp = rt::thread() / 32;
  float* shared = reinterpret_cast<float*>(rt::shared()) + place;
  RT_UNROLL for (int lanes = 8; lanes < 32; lanes *= 2) {
    RT_UNROLL for (int n = 0; n < kNumber; ++n) values[n] += rt::shuffle_xor(values[n], lanes);
  }
  if (lane < kColumns) {
    RT_UNROLL for (int n = 0; n < kNumber; ++n) {
      shared[(n * kWarps + warp) * kColumns + lane] = values[n];
    }
  }
  rt::sync_block();  // all warps write their sums, all lanes read them
  RT_UNROLL for (int n = 0; n < kNumber; ++n) {
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      sums[n][e] = 0.0f;
      RT_UNROLL for (int from = 0; from < kWarps; ++from) {
        sums[n][e] += shared[(n * kWarps + from) * kColumns + lane % 4 * 2 + e];
      }
    }
  }
}
constexpr int kFinishBytes = kMostSums * kWarps * kColumns * 4;
constexpr float kScaledDown = 0x1p-60f;

// Calls with(tile, its sums of the thread's column) for the tiles that are the thread's to add.
template <class With>
RT_DEVICE void for_tiles(const Workspace& w, int slice, With with) {
  const float* sums =
      w.sums + (std::int64_t{rt::block_y()} * w.slices + slice) * w.tiles * kMostSums * kColumns;
  for (int tile = rt::thread() / kColumns; tile < w.tiles; tile += kThreads / kColumns) {
    with(tile, sums + (tile * kMostSums) * kColumns + rt::thread() % kColumns);
  }
}

RT_DEVICE int units_of(int tile, const Shape& shape) {
  const int units = shape.size - tile * kTileUnits;
  return units < kTileUnits ? units : kTileUnits;
}

// A tile's moments: its mean, and the squares around it.
template <class K>
RT_DEVICE void moments_of_tile(const float (&a)[1][4], const Place<K>& place, const Shape& shape,
                               float (&moments)[2][2]) {
  float sum[1][2], squares[1][2] = {};
  RT_UNROLL for (int e = 0; e < 2; ++e) sum[0][e] = a[0][e] + a[0][2 + e];  // padding is 0
  over_lanes(sum);
  const float inv_units = rt::reciprocal(static_cast<float>(units_of(place.entry, shape)));
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    const float mean = sum[0][v % 2] * inv_units;
    const float deviation = place.inside(0, v) ? a[0][v] - mean : 0.0f;
    squares[0][v % 2] += deviation * deviation;
    moments[0][v % 2] = mean;
  }
  over_lanes(squares);
  RT_UNROLL for (int e = 0; e < 2; ++e) moments[1][e] = squares[0][e];
}

// The moments of all tiles (Chan et al. 1979), as in resident/sums.cuh.
RT_DEVICE void moments(const Workspace& w, int slice, const Shape& shape, float eps,
                       float (&mean)[2], float (&rstd)[2]) {
  float sum[1] = {}, squares[1] = {}, all[1][2];
  for_tiles(w, slice, [&](int tile, const float* of_tile) {
    sum[0] += static_cast<float>(units_of(tile, shape)) * *of_tile;
  });
  over_block(sum, 0, all);
  RT_UNROLL for (int e = 0; e < 2; ++e) mean[e] = all[0][e] * shape.inv_size;
  // The mean of the thread's own column, thread % 8.
  float own = 0.0f;
  RT_UNROLL for (int from = 0; from < kWarps; ++from) {
    own += reinterpret_cast<float*>(rt::shared())[from * kColumns + rt::thread() % kColumns];
  }
  own *= shape.inv_size;
  for_tiles(w, slice, [&](int tile, const float* of_tile) {
    const float deviation = *of_tile - own;
    squares[0] +=
        of_tile[kColumns] + static_cast<float>(units_of(tile, shape)) * deviation * deviation;
  });
  over_block(squares, kWarps * kColumns, all);
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    rstd[e] = precise_inverse_root(all[0][e] * shape.inv_size + eps);
  }
}

// A parameter of layer norm at a lane's two units; 0 where there is none.
template <class K>
RT_DEVICE void parameter(const float* base, const Place<K>& place, float (&two)[2]) {
  RT_UNROLL for (int k = 0; k < 2; ++k) {
    const std::int64_t unit = std::int64_t{place.group} * place.size + place.padded_unit(0, 2 * k);
    two[k] = base != nullptr && place.inside(0, 2 * k) ? rt::load(base + unit) : 0.0f;
  }
}

}  // namespace rnnfast::cuda::streaming
