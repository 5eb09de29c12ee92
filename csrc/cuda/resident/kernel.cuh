// The sizes of a resident kernel, and where its data are in shared memory.
//
// A block, or a cluster of blocks that share W_hh, takes one group and up to eight rows of the
// batch through all time steps. Each block holds the rows of W_hh of its own units in registers,
// and in its shared memory the whole state twice (two halves), as factors of a product. Clusters
// (and lone blocks) never communicate with one another.
//
// Every warp multiplies the weights of some tiles of its block's units (kTiles) with one part of
// the state (of kParts). The warps that own a tile add its parts up and do the rest of the step for
// it. The exchange (exchange_block.cuh, exchange_cluster.cuh) brings the state to all blocks.
//
// One time step of forward:
//   1. Await the state: all of h_{t-1} is in its half.
//   2. All warps read it and multiply (begin_product, finish_product). An owner then has the sums
//      of its own units in registers, on top of p_t, which it loaded during the step before. While
//      the tensor cores compute, it loads p_{t+1}.
//   3. Layer norm needs sums over all units (moments), in an exchange of their own.
//   4. f; h_t goes into the other half, as factors again, and from the registers to memory.
//
// One time step of backward, with W_hh^T; the owners begin it with c_t in registers:
//   1. dh_t = c_t + g_t; c_t goes to memory if there is to be a record.
//   2. f'; layer norm and clipping, with one exchange of sums over all units (add_up). The result
//      is da_t: it goes into its half as factors, and from the registers to memory.
//   3. Await the state: all of da_t is in its half.
//   4. The product is c of the step before in time. Meanwhile the owners load that step's inputs.
// Clipping without layer norm only scales a row of da_t, so it may scale the product instead
// (clipping.cuh): its sums travel beside the state, and are there when the product is.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/rt.cuh"

namespace rnnfast::cuda {

// Bytes of kNumber sums, float32: one for every owner and column.
template <int kEntries, int kNumber>
constexpr int kSumsBytes = kEntries * kColumns * kNumber * 4;

constexpr int kBarrierBytes = 6 * 8;  // of the mbarriers of a cluster; a multiple of 16

// kUnits is a multiple of 16; a group has as many units or fewer. The rest is padding, zeros
// throughout.
template <class Mode_, int kUnits_, int kTiles_, int kBlocks_ = 1, int kParts_ = 1,
          int kSharedProducts_ = 0>
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
  // A warp's products (a step of a tile each) have their weights in registers, or the last of them
  // in shared memory, if the registers do not suffice.
  static constexpr int kSharedProducts = kSharedProducts_;
  static constexpr int kRegisterProducts = kSteps * kTiles - kSharedProducts;
  // Here registers do not suffice for addresses either: every step computes them again.
  static constexpr bool kScarce = kSharedProducts * Mode::kWeights > 16 * kTiles;
  static constexpr int kStateWords = kUnits / kTileUnits * Mode::kTileWords;

  // Independent sums of a product: a tensor core, which has a fourth of the warps, takes as long
  // for one product as for four that depend on one another.
  static constexpr int kChains = kWarps * kTiles >= 16 ? 1 : 2;

  // The first kBands warps own the first kOwned tiles of each band, the next kBands warps the next.
  static constexpr int kOwned = (kTiles + kParts - 1) / kParts;  // tiles of an owner
  static constexpr int kOwners = kBands * kTiles / kOwned;
  static constexpr int kOwnerThreads = 32 * kOwners;
  static constexpr bool kAllOwn = kOwners == kWarps;
  static constexpr int kOwnUnits = kTileUnits * kOwned;
  static constexpr int kEntries = kBlocks * kOwners;  // of a sum over all units

  static_assert(kBlocks * kBands * kTiles * kTileUnits == kUnits);
  static_assert(kSteps * kParts * Mode::kDepth == kUnits);
  static_assert(kUnits / kParts % kTileUnits == 0);
  static_assert(kTiles % kOwned == 0);
  static_assert(kRegisterProducts > 0);
  static_assert(kBlocks > 1 || kAllOwn, "the block's barrier is for all warps");
  static_assert(kBands <= 15, "named barriers");

  // Offsets in shared memory. A value of a thread's own (waiting carry, gains) is a float for each
  // owner thread, as often as an owner has values.
  static constexpr int kOwnValuesBytes = kOwned * 4 * kOwnerThreads * 4;
  static constexpr int kState = 0;  // two halves
  static constexpr int kSharedWeights = kState + 2 * kStateWords * 4;
  static constexpr int kPartialSums =
      kSharedWeights + kWarps * kSharedProducts * 32 * Mode::kWeights * 4;
  static constexpr int kGamma = kPartialSums + (kParts > 1 ? kWarps * kTiles * 32 * 4 * 4 : 0);
  static constexpr int kBeta = kGamma + kBlockUnits * 4;
  static constexpr int kNormSums = kBeta + kBlockUnits * 4;
  static constexpr int kBarriers = kNormSums + kSumsBytes<kEntries, 2>;
  static constexpr int kForwardBytes = kBarriers + (kBlocks > 1 ? kBarrierBytes : 0);
  static constexpr int kClipSums = kForwardBytes;
  // Retry flags of the bands, twice; with layer norm instead the norm phases of the warps.
  static constexpr int kRetryWords = kClipSums + kSumsBytes<kEntries, 4>;
  static constexpr int kWaitingCarry = kRetryWords + 128;
  static constexpr int kGains = kWaitingCarry + kOwnValuesBytes;
  static constexpr int kBackwardBytes = kGains + kOwnValuesBytes;

  template <class T>
  RT_DEVICE static T* at(int offset) {
    return reinterpret_cast<T*>(rt::shared() + offset);
  }
};

// One number for each unit and column that a lane of an owner has.
template <class K>
using Values = float[K::kOwned][4];

}  // namespace rnnfast::cuda
