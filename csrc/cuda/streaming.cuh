// A launch for each time step, of any shape on any GPU: what all units of a step wait for is the
// end of the launch before. W_hh and the state, twice, are in memory, as factors of a product, each
// in the order in which lanes read it: no load is wasted, and nothing is checked in the loop.
//
// A block multiplies some tiles (16 units) with some slices (8 rows of the batch); its warps share
// the units that the product goes over, and then the tiles of the result, eight at a time. The rest
// of a step is the warps' own, a tile each. Where it needs sums over all units (layer norm,
// clipping) a second launch finishes the step: what the first has left in memory are the values
// and, of each tile, what its own sums are.
#pragma once

#include "math.cuh"
#include "norms.cuh"
#include "place.cuh"
#include "problem.h"
#include "rt.cuh"
#include "streaming.h"

namespace rnnfast::cuda::streaming {

constexpr int kThreads = kStreamedThreads;
constexpr int kWarps = kThreads / 32;

// Whatever has tiles of a mode, one at a time.
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
  static constexpr int kAll = kTiles * kSlices;  // tiles of the result
  static constexpr int kTogether = kAll < kWarps ? kAll : kWarps;
  static constexpr int kRounds = kAll / kTogether;
  static constexpr int kStepWords = kTiles * Mode::kWeights + kSlices * Mode::kFactors;
  // Steps of the product whose factors come in together, while those before are multiplied.
  static constexpr int kAhead = kStepWords > 24 ? 1 : kStepWords > 8 ? 2 : 4;
  static constexpr int kBytes = kWarps * kTogether * 32 * 16;  // of shared memory
  static_assert(kRounds * kTogether == kAll);
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

// ------------------------------------------------------------------------------ what is where

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
    if constexpr (sizeof what == 8) {  // of two words the compiler makes two stores
      const std::uint64_t high = what[1];
      *reinterpret_cast<std::uint64_t*>(tile + to) = what[0] | high << 32;
    } else {
      rt::store(tile + to, what);
    }
  });
}

// Of a block that has several tiles of one slice: the first of them, and the slice.
struct Strip {
  int tile, slice;

  RT_DEVICE Strip(const Workspace& w, int tiles) {
    const int across = (w.tiles + tiles - 1) / tiles;
    tile = rt::block_x() % across * tiles;
    slice = rt::block_x() / across;
  }
};

// Calls with(tile) for the warp's own of them.
template <class With>
RT_DEVICE void for_own_tiles(const Workspace& w, const Strip& strip, int tiles, With with) {
  for (int n = rt::thread() / 32; n < tiles && strip.tile + n < w.tiles; n += kWarps) {
    with(strip.tile + n);
  }
}

// Whether a tile and a slice are there; those of the last blocks are not all.
RT_DEVICE bool there(const Workspace& w, int tile, int slice) {
  return tile < w.tiles && slice < w.slices;
}

// ------------------------------------------------------------------------------ the product

// W_hh, or its transpose, as factors: of a tile and a step of the product a warp.
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

// Which tiles of the result a block has.
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
  // A warp's own of the tiles that are shared out in a round.
  RT_DEVICE static int index(int round) { return round * K::kTogether + rt::thread() / 32; }
};

// W times the state of step i: to each warp the sums of its tiles (Corner), in the first kTogether.
template <class K>
RT_DEVICE void multiply(const Workspace& w, const Corner<K>& corner, int i, int groups,
                        float (&mine)[K::kRounds][4]) {
  using Mode = typename K::Mode;
  const int lane = rt::thread() % 32, warp = rt::thread() / 32;
  const int steps = w.tiles * (kTileUnits / Mode::kDepth);
  const int begin = steps * warp / kWarps, end = steps * (warp + 1) / kWarps;
  const std::uint32_t* weights[K::kTiles];
  const std::uint32_t* state[K::kSlices];
  RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {  // past the last the last again: nobody takes it
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
           ((of_warp * K::kTogether + tile) * 32 + lane) * 4;
  };
  RT_UNROLL for (int round = 0; round < K::kRounds; ++round) {
    RT_UNROLL for (int tile = 0; tile < K::kTogether; ++tile) {
      const int index = round * K::kTogether + tile;
      std::uint32_t four[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        four[v] = rt::bits_of(Mode::total(sums[index % K::kTiles][index / K::kTiles], v));
      }
      rt::store(part(warp, tile), four);
    }
    rt::sync_block();
    RT_UNROLL for (int v = 0; v < 4; ++v) mine[round][v] = 0.0f;
    if (warp < K::kTogether) {
      RT_UNROLL for (int p = 0; p < kWarps; ++p) {
        std::uint32_t four[4];
        rt::read(part(p, warp), four);
        RT_UNROLL for (int v = 0; v < 4; ++v) mine[round][v] += rt::float_of(four[v]);
      }
    }
    if (round + 1 < K::kRounds) rt::sync_block();
  }
}

// ------------------------------------------------------------------------------ sums of a launch

// Over all threads of the block that have a column (thread % 8): to every lane those of its two.
// In shared memory from float `place` on, where nothing else of the launch is.
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
  rt::sync_block();
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
  const float each = rt::reciprocal(static_cast<float>(units_of(place.entry, shape)));
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    const float mean = sum[0][v % 2] * each;
    const float apart = place.inside(0, v) ? a[0][v] - mean : 0.0f;
    squares[0][v % 2] += apart * apart;
    moments[0][v % 2] = mean;
  }
  over_lanes(squares);
  RT_UNROLL for (int e = 0; e < 2; ++e) moments[1][e] = squares[0][e];
}

// Of all of them together (Chan et al. 1979), as in norms.cuh.
RT_DEVICE void moments(const Workspace& w, int slice, const Shape& shape, float eps,
                       float (&mean)[2], float (&rstd)[2]) {
  float sum[1] = {}, squares[1] = {}, all[1][2];
  for_tiles(w, slice, [&](int tile, const float* of_tile) {
    sum[0] += static_cast<float>(units_of(tile, shape)) * *of_tile;
  });
  over_block(sum, 0, all);
  RT_UNROLL for (int e = 0; e < 2; ++e) mean[e] = all[0][e] * shape.each;
  // The same of the thread's own column, which is one of another lane's two.
  float own = 0.0f;
  RT_UNROLL for (int from = 0; from < kWarps; ++from) {
    own += reinterpret_cast<float*>(rt::shared())[from * kColumns + rt::thread() % kColumns];
  }
  own *= shape.each;
  for_tiles(w, slice, [&](int tile, const float* of_tile) {
    const float apart = *of_tile - own;
    squares[0] += of_tile[kColumns] + static_cast<float>(units_of(tile, shape)) * apart * apart;
  });
  over_block(squares, kWarps * kColumns, all);
  RT_UNROLL for (int e = 0; e < 2; ++e) rstd[e] = rt::inverse_root(all[0][e] * shape.each + eps);
}

// ------------------------------------------------------------------------------ forward

RT_DEVICE int forward_time(const Shape& shape, int direction, int i) {
  return direction ? shape.steps - 1 - i : i;
}

// What step i + 1 sees of h, and h_n; of the words h where the row has step i (`valid`, a bit for
// each of the lane's columns), of h_0 where not.
template <class K>
RT_DEVICE void pass_on(const Forward& a, const Workspace& w, const Place<K>& place, int i, int t,
                       unsigned valid, TileWords<K>& h) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const int d = place.direction, edge = d ? t : t + 1;
  unsigned ends = 0, cuts = 0, waits = 0;  // waits: a row that lacks step i
  RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
    const int column = W::column(place.lane, c);
    const int length = length_of<K>(a.lengths, a.shape, place, column);
    const bool cut = cut_at<K>(a.reset, a.shape, place, edge, column, length);
    const bool end = length == 0 ? i < 0 : i >= 0 && t == (d ? 0 : length - 1);
    ends |= (end ? 1u : 0u) << c;
    cuts |= (cut ? 1u : 0u) << c;
    waits |= column < place.rows && (valid >> c & 1) == 0 ? 1u : 0u;
  }
  if (rt::any(waits != 0)) {
    TileWords<K> h_0;
    fetch<K>(state_track<K>(static_cast<const Stored*>(a.h_0), a.shape, place), true, place, h_0);
    RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
      h[0][j] = valid >> j % W::kColumnsOfLane & 1 ? h[0][j] : h_0[0][j];
    }
  }
  if (rt::any(ends != 0)) {
    put<K>(state_track<K>(static_cast<Stored*>(a.h_n), a.shape, place), place, h, ends);
  }
  RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
    h[0][j] = cuts >> j % W::kColumnsOfLane & 1 ? 0 : h[0][j];
  }
  put_state<K>(w, i + 1, a.shape.groups, place, h);
}

// The columns of the lane's words whose rows have step t.
template <class K>
RT_DEVICE unsigned have_step(const std::int64_t* lengths, const Shape& shape, const Place<K>& place,
                             int t) {
  using W = Words<typename K::Stored>;
  unsigned valid = 0;
  RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
    const int length = length_of<K>(lengths, shape, place, W::column(place.lane, c));
    valid |= (t < length ? 1u : 0u) << c;
  }
  return valid;
}

// h = f(n), of a tile of step i.
template <class K>
RT_DEVICE void activate_tile(const Forward& a, const Workspace& w, const Place<K>& place, int i,
                             int t, unsigned valid, float (&n)[1][4]) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  activate<Stored>(a.nonlinearity, n);
  TileWords<K> h, out;
  // Padding stays 0: of an inf it would have become a NaN, which the next product spreads.
  RT_UNROLL for (int v = 0; v < 4; ++v) n[0][v] = place.inside(0, v) ? n[0][v] : 0.0f;
  W::from_values(n[0], h[0]);
  RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
    out[0][j] = valid >> j % W::kColumnsOfLane & 1 ? h[0][j] : 0;
  }
  put<K>(Track<K, Stored>(static_cast<Stored*>(a.y), a.y_strides, place, t), place, out);
  pass_on<K>(a, w, place, i, t, valid, h);
}

// The state that the first step sees.
template <class Mode>
RT_KERNEL(kThreads)
begin_kernel(Step<Forward> step) {
  using K = Tile<Mode>;
  const Workspace& w = step.workspace;
  const Strip strip(w, step.tiles);
  for_own_tiles(w, strip, step.tiles, [&](int tile) {
    const Place<K> place(step.problem.shape, tile, strip.slice);
    TileWords<K> h = {};
    const int t = forward_time(step.problem.shape, place.direction, -1);
    pass_on<K>(step.problem, w, place, -1, t, 0, h);
  });
}

// p of a tile of step i: on its way from here.
template <class K>
struct ForwardInputs {
  TileWords<K> p;
  unsigned valid;

  RT_DEVICE void fetch_all(const Forward& a, const Place<K>& place, int t) {
    using Stored = typename K::Stored;
    fetch<K>(Track<K, const Stored>(static_cast<const Stored*>(a.p), a.p_strides, place, t), true,
             place, p);
    valid = have_step<K>(a.lengths, a.shape, place, t);
  }
};

template <class K>
RT_KERNEL(kThreads)
forward_kernel(Step<Forward> step) {
  using Stored = typename K::Stored;
  using T = Tile<typename K::Mode>;
  const Forward& a = step.problem;
  const Workspace& w = step.workspace;
  const Corner<K> corner(w);
  ForwardInputs<T> inputs[K::kRounds];
  const auto each = [&](auto with) {
    if (rt::thread() / 32 >= K::kTogether) return;
    RT_UNROLL for (int round = 0; round < K::kRounds; ++round) {
      const int tile = corner.tile_of(round), slice = corner.slice_of(round);
      if (!there(w, tile, slice)) continue;
      const Place<T> place(a.shape, tile, slice);
      with(round, place, forward_time(a.shape, place.direction, step.i));
    }
  };
  // Before the product, which takes its time, where there are registers for them.
  const auto fetch_inputs = [&] {
    each([&](int round, const Place<T>& place, int t) { inputs[round].fetch_all(a, place, t); });
  };
  if (K::kRounds == 1) fetch_inputs();
  float sums[K::kRounds][4];
  multiply<K>(w, corner, step.i, a.shape.groups, sums);
  if (K::kRounds > 1) fetch_inputs();
  each([&](int round, const Place<T>& place, int t) {
    float n[1][4];
    Words<Stored>::to_values(inputs[round].p[0], n[0]);
    RT_UNROLL for (int v = 0; v < 4; ++v) n[0][v] += sums[round][v];
    if (a.gamma != nullptr) {
      float moments[2][2];
      moments_of_tile<T>(n, place, a.shape, moments);
      put_values<T>(w, place, n);
      put_sums<T>(w, place, 0, moments);
    } else {
      activate_tile<T>(a, w, place, step.i, t, inputs[round].valid, n);
    }
  });
}

// A parameter of layer norm at a lane's two units; 0 where there is none.
template <class K>
RT_DEVICE void parameter(const float* base, const Place<K>& place, float (&two)[2]) {
  RT_UNROLL for (int k = 0; k < 2; ++k) {
    const std::int64_t unit = std::int64_t{place.group} * place.size + place.padded_unit(0, 2 * k);
    two[k] = base != nullptr && place.inside(0, 2 * k) ? rt::load(base + unit) : 0.0f;
  }
}

// Layer norm, and what follows it.
template <class Mode>
RT_KERNEL(kThreads)
finish_forward_kernel(Step<Forward> step) {
  using K = Tile<Mode>;
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const Forward& a = step.problem;
  const Workspace& w = step.workspace;
  const Strip strip(w, step.tiles);
  float mean[2], rstd[2];
  moments(w, strip.slice, a.shape, a.norm_eps, mean, rstd);
  for_own_tiles(w, strip, step.tiles, [&](int tile) {
    const Place<K> place(a.shape, tile, strip.slice);
    const int t = forward_time(a.shape, place.direction, step.i);
    const unsigned valid = have_step<K>(a.lengths, a.shape, place, t);
    float n[1][4], gamma[2], beta[2];
    get_values<K>(w, place, n);
    parameter<K>(a.gamma, place, gamma);
    parameter<K>(a.beta, place, beta);
    RT_UNROLL for (int v = 0; v < 4; ++v) {
      n[0][v] = place.inside(0, v) ? (n[0][v] - mean[v % 2]) * rstd[v % 2] : 0.0f;
    }
    TileWords<K> stored;
    W::from_values(n[0], stored[0]);
    RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
      stored[0][j] = valid >> j % W::kColumnsOfLane & 1 ? stored[0][j] : 0;
    }
    put<K>(Track<K, Stored>(static_cast<Stored*>(a.ahat), a.y_strides, place, t), place, stored);
    RT_UNROLL for (int v = 0; v < 4; ++v) n[0][v] = n[0][v] * gamma[v / 2] + beta[v / 2];
    if (tile == 0 && place.lane < 4) {
      RT_UNROLL for (int e = 0; e < 2; ++e) {
        if (place.column(e) >= place.rows) continue;
        const int length = length_of<K>(a.lengths, a.shape, place, place.column(e));
        const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
        a.rstd[point * a.shape.groups + place.group] = t < length ? rstd[e] : 0.0f;
      }
    }
    activate_tile<K>(a, w, place, step.i, t, valid, n);
  });
}

// ------------------------------------------------------------------------------ backward

RT_DEVICE int backward_time(const Shape& shape, int direction, int i) {
  return direction ? i : shape.steps - 1 - i;
}

// What backward is told of a row and a step i.
struct Row {
  bool valid;  // it has the step
  bool last;   // it is its last one, in the order of forward: there grad_h_n comes in
  bool cut;    // no gradient crosses the edge to the step before in this order
  bool begun;  // the step before in this order was the row's first: c is dh_0
};

template <class K>
RT_DEVICE Row row_of(const Backward& a, const Place<K>& place, int i, int column) {
  const int d = place.direction, t = backward_time(a.shape, d, i);
  const int before = backward_time(a.shape, d, i - 1), edge = before + d;
  const int length = length_of<K>(a.lengths, a.shape, place, column);
  Row row;
  row.valid = i < a.shape.steps && t < length;
  row.last = row.valid && t == (d ? 0 : length - 1);
  row.cut = i == 0 || before >= length ||
            cut_at<K>(a.reset, a.shape, place, edge, column, length) ||
            at_window(a.window, edge, length);
  row.begun = i > 0 && length > 0 && before == (d ? length - 1 : 0);
  return row;
}

// da_t of a tile: what the next step multiplies, and dp.
template <class K>
RT_DEVICE void put_da(const Backward& a, const Workspace& w, const Place<K>& place, int i,
                      const float (&da)[1][4]) {
  using Stored = typename K::Stored;
  TileWords<K> out;
  Words<Stored>::from_values(da[0], out[0]);
  const int t = backward_time(a.shape, place.direction, i);
  put_state<K>(w, i + 1, a.shape.groups, place, out);
  put<K>(Track<K, Stored>(static_cast<Stored*>(a.dp), a.dp_strides, place, t), place, out);
}

// What of the tensors a tile of step i needs: on its way from here.
template <class K>
struct BackwardInputs {
  TileWords<K> grad_y, y, ahat;

  RT_DEVICE void fetch_all(const Backward& a, const Place<K>& place, int i) {
    using Stored = typename K::Stored;
    const bool has = i < a.shape.steps;
    const int t = backward_time(a.shape, place.direction, i);
    const auto one = [&](const void* base, const Strides& strides, TileWords<K>& to) {
      fetch<K>(Track<K, const Stored>(static_cast<const Stored*>(base), strides, place, t), has,
               place, to);
    };
    one(a.grad_y, a.grad_y_strides, grad_y);
    one(a.y, a.y_strides, y);
    if (a.gamma != nullptr) one(a.ahat, a.ahat_strides, ahat);
  }
};

// Of a tile: c_t is there. dh_0 of rows that have begun; else on to da_t, or to the second launch.
template <class K>
RT_DEVICE void step_back(const Backward& a, const Workspace& w, const Place<K>& place, int i,
                         const BackwardInputs<K>& inputs, float (&c)[1][4]) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const int t = backward_time(a.shape, place.direction, i);
  const Row rows[2] = {row_of<K>(a, place, i, place.column(0)),
                       row_of<K>(a, place, i, place.column(1))};
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    // Padding stays 0, whatever an inf makes of it.
    c[0][v] = rows[v % 2].cut || !place.inside(0, v) ? 0.0f : c[0][v];
  }
  unsigned begun = 0, ends = 0, empty = 0;
  RT_UNROLL for (int k = 0; k < W::kColumnsOfLane; ++k) {
    const int column = W::column(place.lane, k);
    const Row row = row_of<K>(a, place, i, column);
    const int length = length_of<K>(a.lengths, a.shape, place, column);
    begun |= (row.begun ? 1u : 0u) << k;
    ends |= (row.last ? 1u : 0u) << k;
    empty |= (i == 0 && length == 0 ? 1u : 0u) << k;
  }
  TileWords<K> words = {};
  if (a.grad_h_n != nullptr && rt::any((ends | empty) != 0)) {
    fetch<K>(state_track<K>(static_cast<const Stored*>(a.grad_h_n), a.shape, place), true, place,
             words);
  }
  if (a.dh_0 != nullptr && rt::any((begun | empty) != 0)) {
    const auto dh_0 = state_track<K>(static_cast<Stored*>(a.dh_0), a.shape, place);
    TileWords<K> out;
    W::from_values(c[0], out[0]);
    RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
      out[0][j] = empty >> j % W::kColumnsOfLane & 1 ? words[0][j] : out[0][j];
    }
    put<K>(dh_0, place, out, begun | empty);
  }
  if (i == a.shape.steps) return;

  float dh[1][4], h[1][4], values[4];
  RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
    words[0][j] = ends >> j % W::kColumnsOfLane & 1 ? words[0][j] : 0;
  }
  W::to_values(words[0], dh[0]);
  W::to_values(inputs.grad_y[0], values);
  W::to_values(inputs.y[0], h[0]);
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    dh[0][v] += values[v] + c[0][v];
    if (a.carry == nullptr || place.column(v % 2) >= place.rows || !place.inside(0, v)) continue;
    const std::int64_t row = std::int64_t{t} * a.shape.batch + place.row + place.column(v % 2);
    a.carry[(row * a.shape.groups + place.group) * place.size + place.padded_unit(0, v)] = c[0][v];
  }

  if (a.limit > 0) {
    float blue[3][2];
    blue_sums(dh, blue);
    put_sums<K>(w, place, 0, blue);
  }
  [[maybe_unused]] float ahat[4], gamma[2];
  if (a.gamma != nullptr) {
    W::to_values(inputs.ahat[0], ahat);
    parameter<K>(a.gamma, place, gamma);
    if (a.anew) {
      float beta[2];
      parameter<K>(a.beta, place, beta);
      RT_UNROLL for (int v = 0; v < 4; ++v) h[0][v] = ahat[v] * gamma[v / 2] + beta[v / 2];
      activate<float>(a.nonlinearity, h);  // of h, 1 - h^2 has fewer digits
    }
  }
  differentiate(a.nonlinearity, dh, h);
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    dh[0][v] = rows[v % 2].valid && place.inside(0, v) ? dh[0][v] : 0.0f;
  }
  if (a.gamma == nullptr && a.limit <= 0) return put_da<K>(a, w, place, i, dh);
  put_values<K>(w, place, dh);
  if (a.gamma == nullptr) return;
  float sums[4][2] = {};  // of dahat, and of dahat ahat; scaled down
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    const float dahat = dh[0][v] * gamma[v / 2], down = dh[0][v] * kScaledDown * gamma[v / 2];
    sums[0][v % 2] += dahat;
    sums[1][v % 2] += dahat * ahat[v];
    sums[2][v % 2] += down;
    sums[3][v % 2] += down * ahat[v];
  }
  over_lanes(sums);
  put_sums<K>(w, place, 3, sums);
}

template <class K>
RT_KERNEL(kThreads)
backward_kernel(Step<Backward> step) {
  using T = Tile<typename K::Mode>;
  const Backward& a = step.problem;
  const Workspace& w = step.workspace;
  const Corner<K> corner(w);
  BackwardInputs<T> inputs = {};
  const auto each = [&](auto with) {
    if (rt::thread() / 32 >= K::kTogether) return;
    RT_UNROLL for (int round = 0; round < K::kRounds; ++round) {
      const int tile = corner.tile_of(round), slice = corner.slice_of(round);
      if (there(w, tile, slice)) with(round, Place<T>(a.shape, tile, slice));
    }
  };
  const auto fetch_inputs = [&](int, const Place<T>& place) { inputs.fetch_all(a, place, step.i); };
  if (K::kRounds == 1) each(fetch_inputs);
  float sums[K::kRounds][4] = {};
  if (step.i > 0) multiply<K>(w, corner, step.i, a.shape.groups, sums);
  each([&](int round, const Place<T>& place) {
    if (K::kRounds > 1) fetch_inputs(round, place);
    float c[1][4];
    RT_UNROLL for (int v = 0; v < 4; ++v) c[0][v] = sums[round][v];
    step_back<T>(a, w, place, step.i, inputs, c);
  });
}

// Clipping and layer norm. Both are linear in dh, but for the number that clips: sums of what is
// not clipped yet are multiplied by it. Where the norm is past what float32 has sums for, so may
// these be: then those of the values that are scaled down are taken.
template <class Mode>
RT_KERNEL(kThreads)
finish_backward_kernel(Step<Backward> step) {
  using K = Tile<Mode>;
  using Stored = typename K::Stored;
  const Backward& a = step.problem;
  const Workspace& w = step.workspace;
  const Strip strip(w, step.tiles);
  const int first = a.limit > 0 ? 0 : 3, end = a.gamma != nullptr ? kMostSums : 3;
  float own[kMostSums] = {}, sums[kMostSums][2];
  for_tiles(w, strip.slice, [&](int, const float* of_tile) {
    RT_UNROLL for (int n = 0; n < kMostSums; ++n) {
      if (n >= first && n < end) own[n] += of_tile[n * kColumns];
    }
  });
  over_block(own, 0, sums);
  float scale[2] = {1.0f, 1.0f}, mean[2], along[2];
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    if (a.limit > 0) {
      const float blue[3][2] = {
          {sums[0][0], sums[0][1]}, {sums[1][0], sums[1][1]}, {sums[2][0], sums[2][1]}};
      scale[e] = clip_scale(blue, e, a.limit);
    }
    const bool large = a.limit > 0 && sums[1][e] > kMostSum;
    const float each = (large ? scale[e] / kScaledDown : scale[e]) * a.shape.each;
    mean[e] = (large ? sums[5][e] : sums[3][e]) * each;
    along[e] = (large ? sums[6][e] : sums[4][e]) * each;
  }
  for_own_tiles(w, strip, step.tiles, [&](int tile) {
    const Place<K> place(a.shape, tile, strip.slice);
    const int t = backward_time(a.shape, place.direction, step.i);
    float da[1][4];
    get_values<K>(w, place, da);
    RT_UNROLL for (int v = 0; v < 4; ++v) da[0][v] *= scale[v % 2];
    if (a.gamma != nullptr) {
      float ahat[4], gamma[2], gain[2] = {}, bias[2] = {}, rstd[2];
      bool valid[2];
      TileWords<K> words;
      fetch<K>(Track<K, const Stored>(static_cast<const Stored*>(a.ahat), a.ahat_strides, place, t),
               true, place, words);
      parameter<K>(a.gamma, place, gamma);
      RT_UNROLL for (int e = 0; e < 2; ++e) {
        const int length = length_of<K>(a.lengths, a.shape, place, place.column(e));
        const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
        valid[e] = t < length;
        rstd[e] = valid[e] ? rt::load(a.rstd + point * a.shape.groups + place.group) : 0.0f;
      }
      Words<Stored>::to_values(words[0], ahat);
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        gain[v / 2] += da[0][v] * ahat[v];
        bias[v / 2] += da[0][v];
        const float changed = da[0][v] * gamma[v / 2] - mean[v % 2] - ahat[v] * along[v % 2];
        da[0][v] = valid[v % 2] && place.inside(0, v) ? rstd[v % 2] * changed : 0.0f;
      }
      RT_UNROLL for (int k = 0; k < 2; ++k) {  // over the columns: four lanes side by side
        RT_UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
          gain[k] += rt::shuffle_xor(gain[k], lanes);
          bias[k] += rt::shuffle_xor(bias[k], lanes);
        }
        if (a.dgamma == nullptr || place.lane % 4 != 0 || !place.inside(0, 2 * k)) continue;
        const std::int64_t of_slice = std::int64_t{strip.slice} * a.shape.groups + place.group;
        const std::int64_t unit = of_slice * place.size + place.padded_unit(0, 2 * k);
        a.dgamma[unit] = gain[k] + (step.i > 0 ? a.dgamma[unit] : 0.0f);
        if (a.dbeta == nullptr) continue;
        a.dbeta[unit] = bias[k] + (step.i > 0 ? a.dbeta[unit] : 0.0f);
      }
    }
    put_da<K>(a, w, place, step.i, da);
  });
}

}  // namespace rnnfast::cuda::streaming
