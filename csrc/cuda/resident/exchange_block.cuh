// The exchange of a lone block, between its warps: plain stores, and the block's barrier once a
// turn.
//
// Owners write the state of turn i, all warps read it behind await_state's barrier. The owners
// write the same half again in turn i + 2, behind the barrier of turn i + 1, which no warp passes
// before it has read turn i. Sums that are put before await_state have two halves, ordered
// likewise.
#pragma once

#include "cuda/resident/exchange.cuh"

namespace rnnfast::cuda {

template <class K>
struct BlockExchange {
  using Mode = typename K::Mode;

  // Orders gamma, beta and other words that the block's threads have written before.
  template <int kClipSums = 2>
  RT_DEVICE static void begin(const Place<K>&) {
    rt::sync_block();
  }

  RT_DEVICE static void put_state(int turn, const Place<K>& place, const TileWords<K>& words) {
    const int lane = K::kScarce ? rt::opaque(place.lane) : place.lane;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      std::uint32_t* tile = own_tile(turn, place, m);
      Mode::write(lane, words[m], [&](int to, const auto& what) { rt::store(tile + to, what); });
    }
  }

  RT_DEVICE static void await_state(int) { rt::sync_block(); }

  RT_DEVICE static void expect_state(int, const Place<K>&) {}

  template <int kNumber>
  RT_DEVICE static void put_sums(int which, const Place<K>& place,
                                 const float (&sums)[kNumber][2]) {
    const int lane = lane_for_sums<K, kNumber>(place);
    if (lane >= 4) return;
    put_by_four(sums, own_sums<K, kNumber>(which, place, lane),
                [](float* at, const auto& four) { rt::store(at, four); });
  }

  // Owners write their sums, all owners read them behind this barrier. They write them again behind
  // the next turn's await_state.
  template <int kNumber>
  RT_DEVICE static void await_sums(int, int) {
    rt::sync_block();
  }

  // await_state's barrier has ordered them.
  template <int kNumber>
  RT_DEVICE static void await_sums_beside_state(int, int) {}
};

}  // namespace rnnfast::cuda
