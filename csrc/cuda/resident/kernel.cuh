// A group, and up to eight rows of the batch, go through the whole of time in one block, or in a
// cluster of blocks that share W_hh: each has the rows of its own units in its registers, and all
// of the state, twice, in its shared memory, as factors of a product: two halves. No cluster (no
// lone block) says a word to another.
//
// A warp multiplies some tiles of its block's units (kTiles) with a part of the state (one of
// kParts); what the parts come to is added up by the warps that own the tiles, which also do all
// the rest for them. exchange.cuh tells how the state comes into all the blocks.
//
// One time step of forward:
//   1. await_state: all of h_{t-1} is in its half.
//   2. All warps read it and multiply (start, finish); an owner then has the sums of its own units
//      in its registers, on top of p_t, which came from memory during the step before. While the
//      tensor cores compute, p_{t+1} sets out.
//   3. Layer norm needs sums over all units (moments), with an exchange of their own.
//   4. f; h_t goes into the other half, as factors again, and from the registers to memory.
//
// One time step of backward, with W_hh^T, whose owners have c_t in their registers when it begins:
//   1. dh_t = c_t + g_t; c_t to memory, where there is to be a record.
//   2. f'; layer norm and clipping, with one exchange of sums over all units (add_up). That is
//      da_t: into its half as factors, and from the registers to memory.
//   3. await_state: all of da_t is in its half.
//   4. The product, which is c of the step before in time. Meanwhile what that step reads sets out.
// Clipping alone scales a row of da_t, so it may as well scale what the product comes to: the sums
// go beside the state, and are there when the product is. But where a row's norm is 2^15 or more,
// what is multiplied may be no number of its type any more: then the step is taken once more, with
// that row clipped. Likewise layer norm's sums, which go with those of clipping, are exchanged once
// more; where registers are scarce they always have an exchange of their own.
#pragma once

#include "cuda/resident/exchange.cuh"
#include "cuda/device/fragments.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/norms.cuh"
#include "cuda/device/place.cuh"
#include "cuda/problem.h"
#include "cuda/device/rt.cuh"

namespace rnnfast::cuda {

// Sizes of a kernel: kUnits are a multiple of 16; a group has as many or fewer, of which the rest
// is padding, zeros throughout.
template <class Mode_, int kUnits_, int kTiles_, int kBlocks_ = 1, int kParts_ = 1,
          int kStaged_ = 0>
struct Kernel {
  using Mode = Mode_;
  using Stored = typename Mode::Stored;
  static constexpr int kUnits = kUnits_;
  static constexpr int kBlocks = kBlocks_;  // of a cluster
  static constexpr int kTiles = kTiles_;    // of 16 units, that a warp multiplies
  static constexpr int kParts = kParts_;    // of the state, a warp for each
  static constexpr int kBlockUnits = kUnits / kBlocks;
  static constexpr int kBands = kBlockUnits / (kTileUnits * kTiles);
  static constexpr int kWarps = kBands * kParts;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSteps = kUnits / Mode::kDepth / kParts;  // of a product, of a warp
  // How many of a warp's products (a step of a tile each) have their weights in shared memory,
  // there being no registers for them: the last. Of the others a warp holds them.
  static constexpr int kStaged = kStaged_;
  static constexpr int kHeld = kSteps * kTiles - kStaged;
  // Where registers are scarcest, what is easily made again is, at every step.
  static constexpr bool kScarce = kStaged * Mode::kWeights > 16 * kTiles;
  static constexpr int kStateWords = kUnits / kTileUnits * Mode::kTileWords;

  // Sums that do not wait for one another: a tensor core, which has a fourth of the warps, takes as
  // long for one product as four take one after another.
  static constexpr int kChains = kWarps * kTiles >= 16 ? 1 : 2;

  // Warps own the tiles of a band in turn; those of the first parts, with kBands warps each.
  static constexpr int kOwned = (kTiles + kParts - 1) / kParts;  // tiles of an owner
  static constexpr int kOwners = kBands * kTiles / kOwned;
  static constexpr bool kAllOwn = kOwners == kWarps;
  static constexpr int kOwnUnits = kTileUnits * kOwned;
  static constexpr int kEntries = kBlocks * kOwners;  // of a sum over all units

  static_assert(kBlocks * kBands * kTiles * kTileUnits == kUnits);
  static_assert(kSteps * kParts * Mode::kDepth == kUnits);
  static_assert(kUnits / kParts % kTileUnits == 0);
  static_assert(kTiles % kOwned == 0);
  static_assert(kHeld > 0);
  static_assert(kBlocks > 1 || kAllOwn, "the block's barrier is for all warps");
  static_assert(kBands <= 15, "named barriers");

  // What is where in shared memory.
  static constexpr int kState = 0;  // two halves
  static constexpr int kStagedWeights = kState + 2 * kStateWords * 4;
  static constexpr int kPartialSums = kStagedWeights + kWarps * kStaged * 32 * Mode::kWeights * 4;
  static constexpr int kGamma = kPartialSums + (kParts > 1 ? kWarps * kTiles * 32 * 4 * 4 : 0);
  static constexpr int kBeta = kGamma + kBlockUnits * 4;
  static constexpr int kNormSums = kBeta + kBlockUnits * 4;
  static constexpr int kBarriers = kNormSums + kSumsBytes<kEntries, 2>;
  static constexpr int kForwardBytes = kBarriers + (kBlocks > 1 ? kBarrierBytes : 0);
  static constexpr int kClipSums = kForwardBytes;
  static constexpr int kAgain =
      kClipSums + kSumsBytes<kEntries, 4>;  // for the bands, twice; or for warps
  static constexpr int kKept = kAgain + 128;
  static constexpr int kGains = kKept + kOwned * 4 * 32 * kOwners * 4;
  static constexpr int kBackwardBytes = kGains + kOwned * 4 * 32 * kOwners * 4;

  template <class T>
  RT_DEVICE static T* at(int place) {
    return reinterpret_cast<T*>(rt::shared() + place);
  }
};

template <class K>
using Weights = std::uint32_t[K::kHeld][K::Mode::kWeights];

// Those of a warp in shared memory, of one product of a tile.
template <class K>
RT_DEVICE std::uint32_t* staged_weights(const Place<K>& place, int product) {
  const int index = place.warp * K::kStaged + product - K::kHeld;
  return K::template at<std::uint32_t>(K::kStagedWeights) + index * 32 * K::Mode::kWeights;
}

// The rows of W_hh (or of its transpose) that the warp has, with zeros around them.
template <class K, bool kTransposed>
RT_DEVICE void load_weights(const void* w_hh, const Place<K>& place, Weights<K>& weights) {
  using Mode = typename K::Mode;
  using Stored = typename K::Stored;
  constexpr int kTileSteps = kTileUnits / Mode::kDepth;
  const std::int64_t size = place.size;
  const Stored* w = static_cast<const Stored*>(w_hh) + place.group * size * size;
  const auto load = [&](int s, int m, std::uint32_t* a) {
    const int step = place.part * K::kSteps + s;
    int row = place.band_unit + m * kTileUnits, column = step / kTileSteps * kTileUnits;
    if (kTransposed) {
      const int swapped = row;
      row = column, column = swapped;
    }
    Mode::template weights<kTransposed>(a, w + row * size + column, size, place.size - row,
                                        place.size - column, place.lane, place.paired, step);
  };
  RT_UNROLL for (int n = 0; n < K::kHeld; ++n) {
    load(n / K::kTiles, n % K::kTiles, weights[n]);
    // Else the compiler has all loads under way at once, and no registers for them.
    if (n % (2 * K::kTiles) == 2 * K::kTiles - 1) rt::sync_block();
  }
  for (int n = K::kHeld; n < K::kHeld + K::kStaged; ++n) {
    std::uint32_t a[K::Mode::kWeights];
    load(n / K::kTiles, n % K::kTiles, a);
    RT_UNROLL for (int i = 0; i < K::Mode::kWeights; i += 4) {
      const std::uint32_t four[4] = {a[i], a[i + 1], a[i + 2], a[i + 3]};
      rt::store(staged_weights<K>(place, n) + i * 32 + place.lane * 4, four);
    }
  }
}

template <class K>
using Products = float[K::kTiles][K::kChains][K::Mode::kSums][4];

template <class K>
using Values = float[K::kOwned][4];

// Starts what W times the state in shared memory is, of the tiles of the warp: whatever stands
// between this and `finish` runs while the tensor cores do. The values are what the sums begin
// with; of parts, `finish` adds them.
template <class K>
RT_DEVICE void start(const Weights<K>& weights, const std::uint32_t* state, const Place<K>& place,
                     const Values<K>& values, Products<K>& sums) {
  using Mode = typename K::Mode;
  RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
    RT_UNROLL for (int c = 0; c < K::kChains; ++c) {
      RT_UNROLL for (int i = 0; i < Mode::kSums; ++i) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          sums[m][c][i][v] = 0.0f;
          if constexpr (K::kParts == 1) sums[m][c][i][v] = c + i == 0 ? values[m][v] : 0.0f;
        }
      }
    }
  }
  RT_UNROLL for (int i = 0; i < K::kSteps; ++i) {
    // Those with weights in shared memory come last, read while the tensor cores have work; in
    // exact mode, where a product has three times as many, first, while registers for sums are
    // still free.
    const int s = Mode::kWeights > 4 ? K::kSteps - 1 - i : i;
    std::uint32_t factors[Mode::kFactors];
    // Else the compiler has all loads under way at once, and no registers for them.
    const bool staged = (s + 1) * K::kTiles > K::kHeld;
    if (K::kStaged > 0 && (Mode::kWeights > 4 || staged)) rt::sync_warp();
    Mode::read(state, place.part * K::kSteps + s, place.lane, factors);
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      const int n = s * K::kTiles + m;
      if (n < K::kHeld) {
        Mode::multiply(sums[m][s % K::kChains], weights[n], factors);
      } else {
        std::uint32_t a[Mode::kWeights];
        RT_UNROLL for (int i = 0; i < Mode::kWeights; i += 4) {
          std::uint32_t four[4];
          rt::read(staged_weights<K>(place, n) + i * 32 + place.lane * 4, four);
          RT_UNROLL for (int k = 0; k < 4; ++k) a[i + k] = four[k];
        }
        Mode::multiply(sums[m][s % K::kChains], a, factors);
      }
    }
  }
}

template <class K>
RT_DEVICE float total(const Products<K>& sums, int tile, int v) {
  float sum = 0.0f;
  RT_UNROLL for (int c = 0; c < K::kChains; ++c) sum += K::Mode::total(sums[tile][c], v);
  return sum;
}

// The sums of the tiles that the warp owns. All warps of a band have written their parts before its
// barrier; what the owners read behind it is written again only in the next step, whose state no
// block has before the owners have sent theirs. Before that barrier `between` is called.
template <class K, class Between>
RT_DEVICE void finish(const Products<K>& sums, const Place<K>& place, Values<K>& values,
                      Between between) {
  if constexpr (K::kParts == 1) {
    between();
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) values[m][v] = total<K>(sums, m, v);
    }
  } else {
    // Where registers are scarcest, anew at every step.
    const int warp = K::kStaged > 0 ? rt::opaque(place.warp) : place.warp;
    const int band = warp % K::kBands;
    const auto parts = [&](int part, int tile) {
      const int index = (band * K::kParts + part) * K::kTiles + tile;
      return K::template at<float>(K::kPartialSums) + (index * 32 + place.lane) * 4;
    };
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      std::uint32_t four[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) four[v] = rt::bits_of(total<K>(sums, m, v));
      rt::store(parts(warp / K::kBands, m), four);
    }
    between();
    rt::sync_threads(1 + band, K::kParts * 32);
    if (!place.owner()) return;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float sum[4] = {};
      RT_UNROLL for (int p = 0; p < K::kParts; ++p) {
        std::uint32_t four[4];
        rt::read(parts(p, warp / K::kBands * K::kOwned + m), four);
        RT_UNROLL for (int v = 0; v < 4; ++v) sum[v] += rt::float_of(four[v]);
      }
      RT_UNROLL for (int v = 0; v < 4; ++v) values[m][v] += sum[v];
    }
  }
}

}  // namespace rnnfast::cuda
