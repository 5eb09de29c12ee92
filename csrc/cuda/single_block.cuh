// One block for a group and eight rows of the batch: it has all of W_hh in its registers, and goes
// through the whole of time without a word to another block. Shared memory has the state twice, as
// factors of a product: two halves.
//
// One time step of forward:
//   1. sync_block: all of h_{t-1} is in its half.
//   2. All warps read it and multiply (start, finish); a warp then has the sums of its own units in
//      its registers, on top of p_t, which came from memory during the step before. While the
//      tensor cores compute, p_{t+1} sets out.
//   3. Layer norm needs sums over all units (moments), with one barrier of their own.
//   4. f; h_t goes into the other half, as factors again, and from the registers to memory.
//
// One time step of backward, with W_hh^T, which has c_t in its registers when it begins:
//   1. dh_t = c_t + g_t; c_t to memory, where there is to be a record.
//   2. Clipping (Sums::add), f', layer norm (Sums::add): one barrier each. That is da_t: into its
//      half as factors, and from the registers to memory.
//   3. sync_block: all of da_t is in its half.
//   4. The product, which is c of the step before in time. Meanwhile what that step reads sets out.
//
// What is read of a half in one step is written again two steps later, behind the sync_block of the
// step between, which nobody passes before having read: one barrier a step and two halves are
// enough. Likewise the sums over the warps: between reading them and writing the next lies a
// sync_block.
#pragma once

#include "fragments.cuh"
#include "math.cuh"
#include "norms.cuh"
#include "place.cuh"
#include "problem.h"
#include "rt.cuh"

namespace rnnfast::cuda {

// Sizes of a kernel: kUnits are a multiple of 16; a group has as many or fewer, of which the rest
// is padding, zeros throughout.
template <class Mode_, int kUnits_, int kTiles_>
struct SingleBlock {
  using Mode = Mode_;
  using Stored = typename Mode::Stored;
  static constexpr int kUnits = kUnits_;
  static constexpr int kTiles = kTiles_;  // of a warp, which has 16 kTiles units
  static constexpr int kWarps = kUnits / (kTileUnits * kTiles);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSteps = kUnits / Mode::kDepth;  // of a product
  static constexpr int kStateWords = kUnits / kTileUnits * Mode::kTileWords;
  static_assert(kWarps * kTileUnits * kTiles == kUnits);

  // What is where in shared memory.
  static constexpr int kState = 0;  // two halves
  static constexpr int kGamma = kState + 2 * kStateWords * 4;
  static constexpr int kBeta = kGamma + kUnits * 4;
  static constexpr int kNormSums = kBeta + kUnits * 4;
  static constexpr int kForwardBytes = kNormSums + Sums<kWarps, 2>::kBytes;
  static constexpr int kClipSums = kForwardBytes;
  static constexpr int kKept = kClipSums + Sums<kWarps, 3>::kBytes;
  static constexpr int kBackwardBytes = kKept + kTiles * 4 * kThreads * 4;  // the values of each

  template <class T>
  RT_DEVICE static T* at(int place) {
    return reinterpret_cast<T*>(rt::shared() + place);
  }
};

template <class K>
using Weights = std::uint32_t[K::kTiles][K::kSteps][K::Mode::kWeights];

// The rows of W_hh (or of its transpose) that the warp has, with zeros around them.
template <class K, bool kTransposed>
RT_DEVICE void load_weights(const void* w_hh, const Place<K>& place, Weights<K>& weights) {
  using Stored = typename K::Stored;
  const std::int64_t size = place.size;
  const Stored* w = static_cast<const Stored*>(w_hh) + place.group * size * size;
  RT_UNROLL for (int s = 0; s < K::kSteps; ++s) {
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      int row = place.first_unit + m * kTileUnits, column = s * K::Mode::kDepth;
      if (kTransposed) row = column, column = place.first_unit + m * kTileUnits;
      K::Mode::template weights<kTransposed>(weights[m][s], w + row * size + column, size,
                                             place.size - row, place.size - column, place.lane,
                                             place.paired);
    }
    // Else the compiler has all loads under way at once, and no registers for them.
    if (s % 2 == 1) rt::sync_block();
  }
}

template <class K>
using Products = float[K::kTiles][K::Mode::kChains][4];

// Starts what W times the state in shared memory is, of the units of the warp, added to the values:
// whatever stands between this and `finish` runs while the tensor cores do.
template <class K>
RT_DEVICE void start(const Weights<K>& weights, const std::uint32_t* state, int lane,
                     const float (&values)[K::kTiles][4], Products<K>& sums) {
  using Mode = typename K::Mode;
  RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
    RT_UNROLL for (int c = 0; c < Mode::kChains; ++c) {
      RT_UNROLL for (int v = 0; v < 4; ++v) sums[m][c][v] = c == 0 ? values[m][v] : 0.0f;
    }
  }
  RT_UNROLL for (int s = 0; s < K::kSteps; ++s) {
    std::uint32_t factors[Mode::kFactors];
    Mode::read(state, s, lane, factors);
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      Mode::multiply(sums[m], s, weights[m][s], factors);
    }
  }
}

template <class K>
RT_DEVICE void finish(const Products<K>& sums, float (&values)[K::kTiles][4]) {
  RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
    RT_UNROLL for (int v = 0; v < 4; ++v) values[m][v] = K::Mode::total(sums[m], v);
  }
}

template <class K>
RT_DEVICE void write_state(std::uint32_t* state, const Place<K>& place, const TileWords<K>& words) {
  RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
    K::Mode::write(state, place.warp * K::kTiles + m, place.lane, words[m]);
  }
}

}  // namespace rnnfast::cuda
