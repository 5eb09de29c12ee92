// The exchange of a cluster: how its blocks give one another the state and the sums.
//
// Every owner sends its values into the shared memory of all blocks, its own too: an asynchronous
// store, which an mbarrier of the receiving block counts when it has arrived. A block waits for its
// own mbarriers, until all bytes of a phase have arrived. No thread waits for a store to leave, and
// the loop has no fence.
//
// Each half of the state has an mbarrier. Why this is safe:
// - Blocks write a half again (turn i + 2) only when they have all of turn i + 1. Owners send their
//   part of that turn behind their band's barrier; every warp of the band reaches it with its reads
//   of turn i in registers. So all readers of the half are done: ordered by data, not by a barrier.
// - An mbarrier counts bytes of turn i + 2 only when its phase of turn i is complete: they are sent
//   after all of turn i + 1 has arrived, and this block sends its part of that after its own wait
//   for turn i. They may arrive before thread 0 expects them: the phase also waits for thread 0's
//   arrival, and an mbarrier may count bytes first.
// - No warp misses a phase: the next phase of the same half completes only after that warp (or the
//   owners behind its barrier) has gone on.
// - Sums that the state waits for have one place, and its mbarrier is a phase further each time:
//   owners send them again only after all owners have sent the state that they computed from them.
//   Sums that are sent beside the state have two halves, as it has.
// - All blocks await the last store: none ends while a store to it is under way. (h_T is not sent:
//   nobody reads it.)
#pragma once

#include "cuda/resident/exchange.cuh"

namespace rnnfast::cuda {

template <class K>
struct ClusterExchange {
  using Mode = typename K::Mode;

  // kClipSums: how many sums clipping has.
  template <int kClipSums = 2>
  RT_DEVICE static void begin(const Place<K>& place) {
    if (rt::thread() == 0) {
      RT_UNROLL for (int i = 0; i < kBarrierCount; ++i) rt::mbarrier_init(barrier_of(i), 1);
      rt::mbarrier_fence();  // the mbarriers of this block are made before other blocks use them
    }
    const int bytes = state_bytes(place);
    expect(kFirstHalf, bytes);
    expect(kSecondHalf, bytes);
    expect(kOfNorm, kSumsBytes<K::kEntries, 2>);
    expect(kOfClip, kSumsBytes<K::kEntries, kClipSums>);
    expect(kOfClipSecond, kSumsBytes<K::kEntries, 2>);
    // Columns that are no rows of the batch: no block sends them, all warps multiply them.
    for (int i = rt::thread(); i < 2 * K::kStateWords; i += K::kThreads) state_of<K>(0)[i] = 0;
    // Before any store into another block: that block has made its mbarriers and written its zeros.
    rt::sync_cluster();
  }

  RT_DEVICE static void put_state(int turn, const Place<K>& place, const TileWords<K>& words) {
    // All lanes have read partial sums and sums before the words of any lane are under way.
    rt::sync_warp();
    const int lane = K::kScarce ? rt::opaque(place.lane) : place.lane;
    const int own = own_rank();
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      std::uint32_t* tile = own_tile(turn, place, m);
      Mode::write(lane, words[m], [&](int to, const auto& what) {
        if (Mode::column(place.lane) < place.rows) {
          const std::uint32_t address = rt::address_of(tile + to);
          const std::uint32_t barrier = rt::address_of(barrier_of(turn % 2));
          RT_UNROLL for (int n = 0; n < K::kBlocks; ++n) {
            rt::send(rt::in_block(address, own ^ n), what, rt::in_block(barrier, own ^ n));
          }
        }
      });
    }
  }

  // Owners of all blocks send the state, all warps read it behind this wait; the mbarrier counts
  // every byte.
  RT_DEVICE static void await_state(int turn) {
    rt::mbarrier_wait(barrier_of(turn % 2), turn / 2 % 2);
  }

  RT_DEVICE static void expect_state(int turn, const Place<K>& place) {
    expect(turn % 2, state_bytes(place));
  }

  // kNumber sums of each column, 2 or 4.
  template <int kNumber>
  RT_DEVICE static void put_sums(int which, const Place<K>& place,
                                 const float (&sums)[kNumber][2]) {
    const int lane = lane_for_sums<K, kNumber>(place);
    float* to = own_sums<K, kNumber>(which, place, lane);
    const std::uint32_t barrier = rt::address_of(barrier_of(which));
    const int own = own_rank();
    RT_UNROLL for (int r = 0; r < K::kBlocks; r += 8) {  // each of eight lanes sends to one block
      const int n = r + lane / 4;
      if (K::kBlocks % 8 && n >= K::kBlocks) continue;
      const int rank = own ^ n;
      put_by_four(sums, to, [&](float* at, const auto& four) {
        rt::send(rt::in_block(rt::address_of(at), rank), four, rt::in_block(barrier, rank));
      });
    }
  }

  // Until the sums of all owners are there, the `phase`th time.
  template <int kNumber>
  RT_DEVICE static void await_sums(int which, int phase) {
    rt::mbarrier_wait(barrier_of(which), phase % 2);
    expect(which, kSumsBytes<K::kEntries, kNumber>);  // the next time
  }

  template <int kNumber>
  RT_DEVICE static void await_sums_beside_state(int which, int phase) {
    await_sums<kNumber>(which, phase);
  }

 private:
  RT_DEVICE static std::uint64_t* barrier_of(int which) {
    return K::template at<std::uint64_t>(K::kBarriers) + which;
  }

  // Thread 0 says what the next phase of an mbarrier is to bring.
  RT_DEVICE static void expect(int which, int bytes) {
    if (rt::thread() == 0) rt::mbarrier_expect(barrier_of(which), bytes);
  }

  // All blocks' states. Lanes send whose first column is a row of the batch; nobody reads the
  // columns of the others.
  RT_DEVICE static int state_bytes(const Place<K>& place) {
    return K::kStateWords * 4 / 32 * Mode::lanes(place.rows);
  }

  // The rank of this block, which sends to rank ^ 0, rank ^ 1, ...: at any time one other block
  // sends to each block (bench/gpu_probe/cuda/dsmem_ingress.cu measures that order). With one order
  // for all, every block would send to block 0 first. Opaque, so that the compiler keeps no address
  // of every block in registers.
  RT_DEVICE static int own_rank() { return rt::opaque(rt::cluster_rank()); }
};

}  // namespace rnnfast::cuda
