// Sums over the units of a group, one for each row of the batch: for layer norm, for clipping, for
// the record. In a warp by shuffles over the eight lanes that share two columns; over the warps and
// blocks by an exchange, added by all of them in the same order, so that all have the same bits.
#pragma once

#include <type_traits>

#include "cuda/device/fragments.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/place.cuh"
#include "cuda/device/rt.cuh"
#include "cuda/resident/exchange.cuh"

namespace rnnfast::cuda {

// Sums of the lane's two columns over the units of the warp; all of them at once, since a shuffle
// takes as long as several.
template <int kNumber>
RT_DEVICE void over_lanes(float (&sums)[kNumber][2]) {
  RT_UNROLL for (int lanes = 4; lanes < 32; lanes *= 2) {
    RT_UNROLL for (int n = 0; n < kNumber; ++n) {
      RT_UNROLL for (int e = 0; e < 2; ++e) sums[n][e] += rt::shuffle_xor(sums[n][e], lanes);
    }
  }
}

// Of all owners, in the same order in each: what they come to.
template <class K, int kNumber>
RT_DEVICE void sums_of_all(int which, const Place<K>& place, float (&sums)[kNumber][2]) {
  const int lane = K::kStaged > 0 && kNumber > 2 ? rt::opaque(place.lane) : place.lane;
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

// Gives all owners those of the warp, and waits for theirs.
template <class K, int kNumber>
RT_DEVICE void exchange_sums(int which, int phase, const Place<K>& place,
                             const float (&sums)[kNumber][2]) {
  put_sums<K>(which, place, sums);
  if constexpr (K::kBlocks == 1) rt::sync_block();
  await_sums<K, kNumber>(which, phase);
}

// Adds over all owners.
template <class K, int kNumber>
RT_DEVICE void add_up(int which, int phase, const Place<K>& place, float (&sums)[kNumber][2]) {
  over_lanes(sums);
  exchange_sums<K>(which, phase, place, sums);
  sums_of_all<K>(which, place, sums);
}

// ------------------------------------------------------------------------------ layer norm

// From sums of n numbers around one of them, or around the mean of some, what they are around the
// mean: `sum` is theirs. Numbers that deviate by so little that digits are lost here cannot be: the
// one that the sums are around deviates itself. At most 1 + n (or 1 + n / some) times the rounding.
RT_DEVICE float around_mean(float squares, float sum, float each) {
  const float rest = squares - sum * (sum * each);
  return rest < 0.0f ? 0.0f : rest;  // a NaN stays one
}

// mean and 1 / sqrt(var + eps) of each column. Moments of the owners come together as Chan et al.
// (1979) have it, in one round of sums in a warp and one behind the exchange.
template <class K>
RT_DEVICE void moments(const float (&a)[K::kOwned][4], int i, const Place<K>& place,
                       const Shape& shape, float eps, float (&mean)[2], float (&rstd)[2]) {
  constexpr float kUnits = K::kOwnUnits;
  // How many of an entry's units there are.
  const float entries = static_cast<float>(rt::opaque(shape.size)) / kUnits;
  const auto units_of = [&](int entry) {
    return kUnits * rt::saturate(entries - static_cast<float>(entry));
  };
  const float units = units_of(place.entry), each = units > 0.0f ? rt::reciprocal(units) : 0.0f;
  // Where digits count it is the mean that squares are around, in a round of its own.
  constexpr bool kOfMean = std::is_same_v<typename K::Mode, Exact>;
  float first[1][2] = {}, sums[2][2] = {};
  if constexpr (kOfMean) {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) first[0][v % 2] += a[m][v];  // padding is 0
    }
    over_lanes(first);
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] *= each;
  } else {
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] = rt::shuffle(a[0][e], place.lane % 4);
  }
  RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
    RT_UNROLL for (int v = 0; v < 4; ++v) {
      const float apart = place.inside(m, v) ? a[m][v] - first[0][v % 2] : 0.0f;
      sums[0][v % 2] += apart;
      sums[1][v % 2] += apart * apart;
    }
  }
  over_lanes(sums);
  float mine[2][2];
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    mine[0][e] = first[0][e] + sums[0][e] * each;
    mine[1][e] = around_mean(sums[1][e], sums[0][e], each);
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
      const float apart = of_entry[0][e] - first[0][e], all = units_of(entry) * apart;
      sums[0][e] += all;
      sums[1][e] += of_entry[1][e] + all * apart;
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

// ------------------------------------------------------------------------------ clipping

// Two sums of squares, of the values times 2^48 and times 2^-72: the first has the digits of norms
// from 2^-98 to 2^15, the second from there to 2^136, which is more than 60000 units can have. A
// limit is 1e-30 or more, and of norms below it no digit matters.
constexpr float kUp = 0x1p48f;
constexpr float kDown = 0x1p-72f;

// The first two of some sums, of the lane.
template <int kTiles, int kNumber>
RT_DEVICE void squares_of(const float (&x)[kTiles][4], float (&sums)[kNumber][2]) {
  RT_UNROLL for (int n = 0; n < 2; ++n) sums[n][0] = sums[n][1] = 0.0f;
  RT_UNROLL for (int m = 0; m < kTiles; ++m) {
    RT_UNROLL for (int v = 0; v < 4; ++v) {
      const float up = x[m][v] * kUp, down = x[m][v] * kDown;
      sums[0][v % 2] += up * up;
      sums[1][v % 2] += down * down;
    }
  }
}

// Whether a row has a norm from 2^15 on (inf and NaN, too): what is made of its values before they
// are clipped may not be a number of its type any more.
template <int kNumber>
RT_DEVICE bool too_large(const float (&sums)[kNumber][2], int e) {
  return !(sums[0][e] < 0x1p126f);
}

// min(1, limit / norm); 1 where the norm is inf or NaN.
template <int kNumber>
RT_DEVICE float clip_scale(const float (&sums)[kNumber][2], int e, float limit) {
  const bool large = too_large(sums, e);
  const float sum = large ? sums[1][e] : sums[0][e];
  const float scale = limit * (rt::fast_inverse_root(sum) * (large ? kDown : kUp));
  return sum < __builtin_inff() && scale < 1.0f ? scale : 1.0f;
}

}  // namespace rnnfast::cuda
