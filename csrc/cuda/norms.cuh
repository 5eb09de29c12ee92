// Sums over the units of a group, one for each row of the batch: for layer norm, for clipping, for
// the record. In a warp by shuffles over the eight lanes that share two columns; over the warps and
// blocks by an exchange, added by all of them in the same order, so that all have the same bits.
#pragma once

#include <type_traits>

#include "exchange.cuh"
#include "fragments.cuh"
#include "place.cuh"
#include "rt.cuh"

namespace rnnfast::cuda {

// Blue's three scaled sums of squares (ACM TOMS 4, 1978), each right where the one before is not:
// of values below 2^-40, of the usual ones, of values from 2^50 on. Subnormal values included.
constexpr float kSmallScale = 0x1p100f;
constexpr float kLargeScale = 0x1p-80f;
constexpr float kLeastSum = 0x1p-80f;  // that is right as it is
constexpr float kMostSum = 0x1p100f;

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

// Adds over all owners, in step i.
template <class K, int kNumber>
RT_DEVICE void add_up(float (&sums)[kNumber][2], int i, const Place<K>& place) {
  exchange_sums<K>(i, place, sums);
  RT_UNROLL for (int n = 0; n < kNumber; ++n) sums[n][0] = sums[n][1] = 0.0f;
  for_entries<K, kNumber>(place.lane, [&](int entry) {
    float of_entry[kNumber][2];
    read_sums<K>(entry, place.lane, of_entry);
    RT_UNROLL for (int n = 0; n < kNumber; ++n) {
      RT_UNROLL for (int e = 0; e < 2; ++e) sums[n][e] += of_entry[n][e];
    }
  });
  if constexpr (kLanesShare<K>) over_lanes(sums);
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
  exchange_sums<K>(i, place, mine);
  float of_entry[2][2];
  if constexpr (kOfMean) {
    first[0][0] = first[0][1] = 0.0f;
    for_entries<K, 2>(place.lane, [&](int entry) {
      read_sums<K>(entry, place.lane, of_entry);
      RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] += units_of(entry) * of_entry[0][e];
    });
    if constexpr (kLanesShare<K>) over_lanes(first);
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] *= shape.each;
  } else {
    read_sums<K>(0, place.lane, of_entry);
    RT_UNROLL for (int e = 0; e < 2; ++e) first[0][e] = of_entry[0][e];
  }
  sums[0][0] = sums[0][1] = sums[1][0] = sums[1][1] = 0.0f;
  for_entries<K, 2>(place.lane, [&](int entry) {
    read_sums<K>(entry, place.lane, of_entry);
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      const float apart = of_entry[0][e] - first[0][e], all = units_of(entry) * apart;
      sums[0][e] += all;
      sums[1][e] += of_entry[1][e] + all * apart;
    }
  });
  if constexpr (kLanesShare<K>) over_lanes(sums);
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    mean[e] = first[0][e] + sums[0][e] * shape.each;
    const float squares = around_mean(sums[1][e], sums[0][e], shape.each);
    rstd[e] = rt::inverse_root(squares * shape.each + eps);
  }
}

// ------------------------------------------------------------------------------ Blue's sums

template <int kTiles>
RT_DEVICE void blue_sums(const float (&x)[kTiles][4], float (&sums)[3][2]) {
  RT_UNROLL for (int n = 0; n < 3; ++n) sums[n][0] = sums[n][1] = 0.0f;
  RT_UNROLL for (int m = 0; m < kTiles; ++m) {
    RT_UNROLL for (int v = 0; v < 4; ++v) {
      const float up = x[m][v] * kSmallScale, down = x[m][v] * kLargeScale;
      sums[0][v % 2] += up * up;
      sums[1][v % 2] += x[m][v] * x[m][v];
      sums[2][v % 2] += down * down;
    }
  }
  over_lanes(sums);
}

// The sum that is right, and what its values were multiplied by. inf takes the last one, a NaN
// stays what it is.
RT_DEVICE float chosen(const float (&sums)[3][2], int e, float& scale) {
  const float usual = sums[1][e];
  const bool small = usual<kLeastSum, large = usual> kMostSum;
  scale = small ? kSmallScale : large ? kLargeScale : 1.0f;
  return small ? sums[0][e] : large ? sums[2][e] : usual;
}

// min(1, limit / norm); 1 where the norm is inf or NaN.
RT_DEVICE float clip_scale(const float (&sums)[3][2], int e, float limit) {
  float scale;
  const float norm = rt::square_root(chosen(sums, e, scale)), most = limit * scale;
  return norm > most && norm < __builtin_inff() ? rt::divide(most, norm) : 1.0f;
}

}  // namespace rnnfast::cuda
