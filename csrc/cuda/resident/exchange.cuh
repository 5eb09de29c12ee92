// Shared by the two exchanges: where the state and the sums are in shared memory, and how owners
// read sums. An exchange has, as static members:
//   begin            before the first store; by all threads
//   put_state        an owner's tiles, into the state of a turn
//   await_state      until all of that state is there; by all warps
//   expect_state     behind await_state, for the turn after the next
//   put_sums         an owner's sums over its units, to all owners
//   await_sums       until the sums of all owners are there
//   await_sums_beside_state   likewise, for sums put before await_state
// A turn is a time step; in backward it may be a step taken once more (clipping.cuh). Turn i has
// its state in half i % 2.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/place.cuh"
#include "cuda/device/rt.cuh"
#include "cuda/resident/kernel.cuh"

namespace rnnfast::cuda {

// The places of sums: layer norm's, and clipping's (two halves, or one place of both together).
// In a cluster an mbarrier has the same number.
enum { kFirstHalf, kSecondHalf, kOfNorm, kOfClip, kOfClipSecond, kBarrierCount };
static_assert(kBarrierCount * 8 <= kBarrierBytes);

template <class K>
RT_DEVICE std::uint32_t* state_of(int turn) {
  return K::template at<std::uint32_t>(K::kState) + turn % 2 * K::kStateWords;
}

template <class K>
RT_DEVICE float* sums_of(int which) {
  const int offset = which == kOfNorm ? K::kNormSums : K::kClipSums;
  return K::template at<float>(offset) +
         (which == kOfClipSecond ? kSumsBytes<K::kEntries, 2> / 4 : 0);
}

// A tile of the state of a turn: the first of the warp's, or a later one.
template <class K>
RT_DEVICE std::uint32_t* own_tile(int turn, const Place<K>& place, int tile) {
  return state_of<K>(turn) + (place.first_unit / kTileUnits + tile) * K::Mode::kTileWords;
}

// Where an owner's sums belong: columns 2 q and 2 q + 1, side by side; eight lanes have the same.
template <class K, int kNumber>
RT_DEVICE float* own_sums(int which, const Place<K>& place, int lane) {
  return sums_of<K>(which) + (place.entry * kColumns + lane % 4 * 2) * kNumber;
}

// Calls put(float of own_sums, four words) until all sums are put.
template <int kNumber, class Put>
RT_DEVICE void put_by_four(const float (&sums)[kNumber][2], float* to, Put put) {
  std::uint32_t words[2 * kNumber];
  RT_UNROLL for (int n = 0; n < kNumber; ++n) {
    RT_UNROLL for (int e = 0; e < 2; ++e) words[e * kNumber + n] = rt::bits_of(sums[n][e]);
  }
  RT_UNROLL for (int n = 0; n < 2 * kNumber; n += 4) {
    const std::uint32_t four[4] = {words[n], words[n + 1], words[n + 2], words[n + 3]};
    put(to + n, four);
  }
}

// kNumber sums of an entry, of the lane's two columns.
template <class K, int kNumber>
RT_DEVICE void read_sums(int which, int entry, int lane, float (&sums)[kNumber][2]) {
  const float* from = sums_of<K>(which) + (entry * kColumns + lane % 4 * 2) * kNumber;
  RT_UNROLL for (int n = 0; n < 2 * kNumber; n += 4) {
    std::uint32_t four[4];
    rt::read(from + n, four);
    RT_UNROLL for (int k = 0; k < 4; ++k) {
      sums[(n + k) % kNumber][(n + k) / kNumber] = rt::float_of(four[k]);
    }
  }
}

// Where there are many entries each of eight lanes reads some: their sums are still to be added up
// (over_lanes).
template <class K>
constexpr bool kLanesShare = K::kEntries > 4;

// Calls with(entry) for all entries, or for the lane's share.
template <class K, int kNumber, class With>
RT_DEVICE void for_entries(int lane, With with) {
  if constexpr (kLanesShare<K>) {
    RT_UNROLL for (int first = 0; first < K::kEntries; first += 8) {
      // Orders no data: without it the compiler issues all reads at once and runs out of registers.
      if (first > 0 && first % (kNumber == 2 ? 32 : 8) == 0) rt::sync_warp();
      const int entry = first + lane / 4;
      if (K::kEntries % 8 == 0 || entry < K::kEntries) with(entry);
    }
  } else {
    RT_UNROLL for (int entry = 0; entry < K::kEntries; ++entry) with(entry);
  }
}

// The lane, for the addresses of sums. Where registers are scarce every step computes them again.
template <class K, int kNumber>
RT_DEVICE int lane_for_sums(const Place<K>& place) {
  return K::kSharedProducts > 0 && kNumber > 2 ? rt::opaque(place.lane) : place.lane;
}

}  // namespace rnnfast::cuda
