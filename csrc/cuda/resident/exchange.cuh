// How blocks of a cluster give each other the state and sums over all units; of a lone block, its
// warps.
//
// In a cluster every warp that owns tiles sends what it has into the shared memory of all blocks,
// its own too: a store that is under way for some time, and that an mbarrier of the block where it
// goes counts once it is there. A block waits for its own mbarriers, until all bytes have come that
// a phase is to bring. No thread waits for a store to leave; nothing in the loop is a fence.
//
// Two halves of the state, turn i in half i % 2, with an mbarrier each: a turn is a step, or a step
// once more (backward.cuh). What makes it safe:
// - A half is written again (turn i + 2) by blocks that have all of turn i + 1, which is sent by
//   owners behind their band's barrier, which all its warps reach with what they have read of turn
//   i in their registers. So all of its readers are done: by data, not by a barrier.
// - An mbarrier counts bytes of turn i + 2 only when its phase of turn i is complete: they are sent
//   after all of turn i + 1 has come, which this block sends after its own wait for turn i.
//   They may come before thread 0 has said how many to expect: its arrival, which the phase waits
//   for, is still to come, and bytes may be counted first.
// - No warp can miss a phase: for the next one of the same half to complete, that warp (or the
//   owners behind its barrier) must have gone on.
// - Sums that the state waits for have one place, and an mbarrier that is a phase further each
// time:
//   they are sent again only after all owners have sent the state that they computed from them.
//   Sums that are sent beside the state have two halves, as it has.
// - The last thing that is sent is awaited by all blocks: none ends while a store to it is under
//   way. (h_T is not sent: nobody reads it.)
//
// Of a lone block the state is a plain store and the block's barrier, one in each step. What is
// read of a half in one step is written again two steps later, behind the barrier of the step
// between, which nobody passes before having read. Likewise the sums.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/place.cuh"
#include "cuda/device/rt.cuh"

namespace rnnfast::cuda {

// Of the state's halves and of the sums: what layer norm, and what clipping is to know (its two
// halves, or one place of both together).
enum { kFirstHalf, kSecondHalf, kOfNorm, kOfClip, kOfClipSecond, kBarrierCount };
constexpr int kBarrierBytes = 6 * 8;  // a multiple of 16

// Of kNumber sums, float32: for every owner and column.
template <int kEntries, int kNumber>
constexpr int kSumsBytes = kEntries * kColumns * kNumber * 4;

template <class K>
RT_DEVICE std::uint64_t* barrier_of(int which) {
  return K::template at<std::uint64_t>(K::kBarriers) + which;
}

template <class K>
RT_DEVICE std::uint32_t* state_of(int i) {
  return K::template at<std::uint32_t>(K::kState) + i % 2 * K::kStateWords;
}

// What comes of all blocks' states: lanes whose first column is a row of the batch send; the
// others' columns nobody reads.
template <class K>
RT_DEVICE int state_bytes(const Place<K>& place) {
  return K::kStateWords * 4 / 32 * K::Mode::lanes(place.rows);
}

// The thread that tells an mbarrier what its next phase is to bring.
template <class K>
RT_DEVICE void expect(int which, int bytes) {
  if (rt::thread() == 0) rt::mbarrier_expect(barrier_of<K>(which), bytes);
}

// Before anything is sent, by all threads. kClipSums: how many sums clipping has.
template <class K, int kClipSums = 2>
RT_DEVICE void begin_exchange(const Place<K>& place) {
  if constexpr (K::kBlocks > 1) {
    if (rt::thread() == 0) {
      RT_UNROLL for (int i = 0; i < kBarrierCount; ++i) rt::mbarrier_init(barrier_of<K>(i), 1);
      rt::mbarrier_fence();
    }
    const int bytes = state_bytes<K>(place);
    expect<K>(kFirstHalf, bytes);
    expect<K>(kSecondHalf, bytes);
    expect<K>(kOfNorm, kSumsBytes<K::kEntries, 2>);
    expect<K>(kOfClip, kSumsBytes<K::kEntries, kClipSums>);
    expect<K>(kOfClipSecond, kSumsBytes<K::kEntries, 2>);
    // Columns that are no rows of the batch: nothing is sent of them.
    for (int i = rt::thread(); i < 2 * K::kStateWords; i += K::kThreads) state_of<K>(0)[i] = 0;
    rt::sync_cluster();
  } else {
    rt::sync_block();
  }
}

// The rank of this block, which sends to rank ^ 0, rank ^ 1, ...: at any time each block of the
// cluster is sent to by one other (bench/gpu_probe/cuda/dsmem_ingress.cu measures that order). With
// one order for all, every block would send to block 0 first. Opaque, so that the compiler keeps no
// address of every block in registers.
template <class K>
RT_DEVICE int own_rank() {
  return K::kBlocks > 1 ? rt::opaque(rt::cluster_rank()) : 0;
}

// The owned tiles of a warp, as they are stored in memory, into the state of step i.
template <class K>
RT_DEVICE void put_state(int i, const Place<K>& place, const TileWords<K>& words) {
  using Mode = typename K::Mode;
  // What any lane has read of partial sums and sums, it has before another's words are on their
  // way.
  if constexpr (K::kBlocks > 1) rt::sync_warp();
  const int lane = K::kScarce ? rt::opaque(place.lane) : place.lane;
  const int own = own_rank<K>();
  RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
    std::uint32_t* tile = state_of<K>(i) + (place.first_unit / kTileUnits + m) * Mode::kTileWords;
    Mode::write(lane, words[m], [&](int to, const auto& what) {
      if constexpr (K::kBlocks == 1) {
        rt::store(tile + to, what);
      } else if (Mode::column(place.lane) < place.rows) {
        const std::uint32_t address = rt::address_of(tile + to);
        const std::uint32_t barrier = rt::address_of(barrier_of<K>(i % 2));
        RT_UNROLL for (int n = 0; n < K::kBlocks; ++n) {
          rt::send(rt::in_block(address, own ^ n), what, rt::in_block(barrier, own ^ n));
        }
      }
    });
  }
}

// Until all of the state of step i is there.
template <class K>
RT_DEVICE void await_state(int i) {
  if constexpr (K::kBlocks == 1) {
    rt::sync_block();
  } else {
    rt::mbarrier_wait(barrier_of<K>(i % 2), i / 2 % 2);
  }
}

// Behind that, for step i + 2.
template <class K>
RT_DEVICE void expect_state(int i, const Place<K>& place) {
  if constexpr (K::kBlocks > 1) expect<K>(i % 2, state_bytes<K>(place));
}

// Where sums are that one of the mbarriers is for.
template <class K>
RT_DEVICE float* sums_of(int which) {
  const int place = which == kOfNorm ? K::kNormSums : K::kClipSums;
  return K::template at<float>(place) +
         (which == kOfClipSecond ? kSumsBytes<K::kEntries, 2> / 4 : 0);
}

// kNumber sums of each column, 2 or 4, over the owner's units, for the owners of all blocks.
template <class K, int kNumber>
RT_DEVICE void put_sums(int which, const Place<K>& place, const float (&sums)[kNumber][2]) {
  // Columns 2 q and 2 q + 1 of an entry, side by side; eight lanes have the same.
  std::uint32_t words[2 * kNumber];
  RT_UNROLL for (int n = 0; n < kNumber; ++n) {
    RT_UNROLL for (int e = 0; e < 2; ++e) words[e * kNumber + n] = rt::bits_of(sums[n][e]);
  }
  // Where registers are scarce, addresses are made again, at every step.
  const int lane = K::kStaged > 0 && kNumber > 2 ? rt::opaque(place.lane) : place.lane;
  float* to = sums_of<K>(which) + (place.entry * kColumns + lane % 4 * 2) * kNumber;
  const auto each = [&](auto put) {
    RT_UNROLL for (int n = 0; n < 2 * kNumber; n += 4) {
      const std::uint32_t four[4] = {words[n], words[n + 1], words[n + 2], words[n + 3]};
      put(to + n, four);
    }
  };
  if constexpr (K::kBlocks == 1) {
    if (lane < 4) {
      each([](float* at, const auto& four) { rt::store(at, four); });
    }
  } else {
    const std::uint32_t barrier = rt::address_of(barrier_of<K>(which));
    const int own = own_rank<K>();
    RT_UNROLL for (int r = 0; r < K::kBlocks; r += 8) {  // a block for each of the eight
      const int n = r + lane / 4;
      if (K::kBlocks % 8 && n >= K::kBlocks) continue;
      const int rank = own ^ n;
      each([&](float* at, const auto& four) {
        rt::send(rt::in_block(rt::address_of(at), rank), four, rt::in_block(barrier, rank));
      });
    }
  }
}

// Until all of them are there, the `phase`th time. Of a lone block a barrier has to be between.
template <class K, int kNumber>
RT_DEVICE void await_sums(int which, int phase) {
  if constexpr (K::kBlocks > 1) {
    rt::mbarrier_wait(barrier_of<K>(which), phase % 2);
    expect<K>(which, kSumsBytes<K::kEntries, kNumber>);  // the next time
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

// Calls with(entry) of all entries; where they are many each of eight lanes takes some, and what
// they have is still to be added up (over_lanes).
template <class K>
constexpr bool kLanesShare = K::kEntries > 4;

template <class K, int kNumber, class With>
RT_DEVICE void for_entries(int lane, With with) {
  if constexpr (kLanesShare<K>) {
    RT_UNROLL for (int first = 0; first < K::kEntries; first += 8) {
      // Else all are under way at once, and there are no registers for them.
      if (first > 0 && first % (kNumber == 2 ? 32 : 8) == 0) rt::sync_warp();
      const int entry = first + lane / 4;
      if (K::kEntries % 8 == 0 || entry < K::kEntries) with(entry);
    }
  } else {
    RT_UNROLL for (int entry = 0; entry < K::kEntries; ++entry) with(entry);
  }
}

}  // namespace rnnfast::cuda
