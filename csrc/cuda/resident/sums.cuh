// Sums over all units of a group, for layer norm and clipping: first in a warp, then over the
// owners of all blocks by an exchange.
#pragma once

#include <type_traits>

#include "cuda/device/math.cuh"
#include "cuda/device/norms.cuh"
#include "cuda/resident/exchange_block.cuh"
#include "cuda/resident/exchange_cluster.cuh"

namespace rnnfast::cuda {

template <class K>
using Exchange = std::conditional_t<K::kBlocks == 1, BlockExchange<K>, ClusterExchange<K>>;

// Totals over all owner warps. All add in one order, so all get the same bits.
template <class K, int kNumber>
RT_DEVICE void sums_of_all(int which, const Place<K>& place, float (&sums)[kNumber][2]) {
  const int lane = lane_for_sums<K, kNumber>(place);
  RT_UNROLL for (int n = 0; n < kNumber; ++n) sums[n][0] = sums[n][1] = 0.0f;
  for_entries<K, kNumber>(lane, [&](int entry) {
    float of_entry[kNumber][2];
    read_sums<K>(which, entry, lane, of_entry);
    RT_UNROLL for (int n = 0; n < kNumber; ++n) {
      RT_UNROLL for (int e = 0; e < 2; ++e) sums[n][e] += of_entry[n][e];
    }
  });
  if constexpr (kLanesShare<K>) over_lanes(sums);
}

// Puts the warp's sums for all owners, and waits for theirs.
template <class K, int kNumber>
RT_DEVICE void exchange_sums(int which, int phase, const Place<K>& place,
                             const float (&sums)[kNumber][2]) {
  Exchange<K>::put_sums(which, place, sums);
  Exchange<K>::template await_sums<kNumber>(which, phase);
}

// Adds the sums of all lanes and owners up.
template <class K, int kNumber>
RT_DEVICE void add_up(int which, int phase, const Place<K>& place, float (&sums)[kNumber][2]) {
  over_lanes(sums);
  exchange_sums<K>(which, phase, place, sums);
  sums_of_all<K>(which, place, sums);
}

// mean and 1 / sqrt(var + eps) of each column. The owners' moments are combined as in Chan et al.
// (1979): one round of sums in a warp, and one behind the exchange.
template <class K>
RT_DEVICE void moments(const float (&a)[K::kOwned][4], int i, const Place<K>& place,
                       const Shape& shape, float eps, float (&mean)[2], float (&rstd)[2]) {
  constexpr float kUnits = K::kOwnUnits;
  // How many units of an entry are inside the group.
  const float entries = static_cast<float>(rt::opaque(shape.size)) / kUnits;
  const auto units_of = [&](int entry) {
    return kUnits * rt::saturate(entries - static_cast<float>(entry));
  };
  const float units = units_of(place.entry),
              inv_units = units > 0.0f ? rt::reciprocal(units) : 0.0f;
  // In exact mode squares are around the mean, which takes a round of its own.
  constexpr bool kOfMean = std::is_same_v<typename K::Mode, Exact>;
  float first[1][2] = {}, sums[2][2] = {};
  if constexpr (kOfMean) {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) first[0][v % 2] += a[m][v];  // padding is 0
    }
    over_lanes(first);
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] *= inv_units;
  } else {
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] = rt::shuffle(a[0][e], place.lane % 4);
  }
  RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
    RT_UNROLL for (int v = 0; v < 4; ++v) {
      const float deviation = place.inside(m, v) ? a[m][v] - first[0][v % 2] : 0.0f;
      sums[0][v % 2] += deviation;
      sums[1][v % 2] += deviation * deviation;
    }
  }
  over_lanes(sums);
  float mine[2][2];
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    mine[0][e] = first[0][e] + sums[0][e] * inv_units;
    mine[1][e] = around_mean(sums[1][e], sums[0][e], inv_units);
  }
  exchange_sums<K>(kOfNorm, i, place, mine);
  float of_entry[2][2];
  if constexpr (kOfMean) {
    first[0][0] = first[0][1] = 0.0f;
    for_entries<K, 2>(place.lane, [&](int entry) {
      read_sums<K>(kOfNorm, entry, place.lane, of_entry);
      RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] += units_of(entry) * of_entry[0][e];
    });
    if constexpr (kLanesShare<K>) over_lanes(first);
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] *= shape.inv_size;
  } else {
    read_sums<K>(kOfNorm, 0, place.lane, of_entry);
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] = of_entry[0][e];
  }
  sums[0][0] = sums[0][1] = sums[1][0] = sums[1][1] = 0.0f;
  for_entries<K, 2>(place.lane, [&](int entry) {
    read_sums<K>(kOfNorm, entry, place.lane, of_entry);
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      const float deviation = of_entry[0][e] - first[0][e], all = units_of(entry) * deviation;
      sums[0][e] += all;
      sums[1][e] += of_entry[1][e] + all * deviation;
    }
  });
  if constexpr (kLanesShare<K>) over_lanes(sums);
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    mean[e] = first[0][e] + sums[0][e] * shape.inv_size;
    const float squares = around_mean(sums[1][e], sums[0][e], shape.inv_size);
    const float variance = squares * shape.inv_size + eps;
    rstd[e] = kOfMean ? precise_inverse_root(variance) : rt::inverse_root(variance);
  }
}

}  // namespace rnnfast::cuda
