// Sums over the units of a group, one for each row of the batch: for layer norm, for clipping, for
// the record. In a warp by shuffles over the eight lanes that share two columns; over the warps
// through shared memory, added by every thread in the same order, so that all have the same bits.
#pragma once

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

// The sum of one of the lane's two columns over the units of the warp.
template <class T>
RT_DEVICE T over_lanes(T value) {
  RT_UNROLL for (int lanes = 4; lanes < 32; lanes *= 2) value += rt::shuffle_xor(value, lanes);
  return value;
}

// kNumber sums of every warp and column in shared memory.
template <int kWarps, int kNumber>
struct Sums {
  static constexpr int kBytes = kWarps * kNumber * kColumns * 4;

  // Adds over all warps. The block's one barrier is between writing and reading; another one, of
  // the step, has to lie between this call and the next.
  RT_DEVICE static void add(float (&sums)[kNumber][2], float* shared, int warp, int lane) {
    write(sums, shared, warp, lane);
    rt::sync_block();
    RT_UNROLL for (int i = 0; i < kNumber; ++i) sums[i][0] = sums[i][1] = 0.0f;
    RT_UNROLL_2 for (int w = 0; w < kWarps; ++w) {
      RT_UNROLL for (int i = 0; i < kNumber; ++i) {
        RT_UNROLL for (int e = 0; e < 2; ++e) sums[i][e] += read(shared, w, i, lane, e);
      }
    }
  }

  RT_DEVICE static void write(const float (&sums)[kNumber][2], float* shared, int warp, int lane) {
    if (lane >= 4) return;  // all eight lanes have the same
    RT_UNROLL for (int i = 0; i < kNumber; ++i) {
      RT_UNROLL for (int e = 0; e < 2; ++e) {
        shared[(warp * kNumber + i) * kColumns + lane * 2 + e] = sums[i][e];
      }
    }
  }

  RT_DEVICE static float read(const float* shared, int warp, int i, int lane, int e) {
    return shared[(warp * kNumber + i) * kColumns + lane % 4 * 2 + e];
  }
};

// ------------------------------------------------------------------------------ layer norm

// mean and 1 / sqrt(var + eps) of each column. Moments of the warps come together as Chan et al.
// (1979) have it: no sum of squares but around a mean.
template <class K>
RT_DEVICE void moments(const float (&a)[K::kTiles][4], const Place<K>& place, float eps,
                       float* shared, float (&mean)[2], float (&rstd)[2]) {
  constexpr int kEach = kTileUnits * K::kTiles;
  using Two = Sums<K::kWarps, 2>;
  const auto units_of_warp = [&](int warp) {
    const int units = place.size - warp * kEach;
    return static_cast<float>(units < 0 ? 0 : units > kEach ? kEach : units);
  };
  const float units = units_of_warp(place.warp), each = units > 0.0f ? 1.0f / units : 0.0f;
  float mine[2][2];
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    float sum = 0.0f, squares = 0.0f;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) sum += a[m][e] + a[m][2 + e];  // padding is 0
    mine[0][e] = over_lanes(sum) * each;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = e; v < 4; v += 2) {
        const float apart = place.inside(m, v) ? a[m][v] - mine[0][e] : 0.0f;
        squares += apart * apart;
      }
    }
    mine[1][e] = over_lanes(squares);
  }
  Two::write(mine, shared, place.warp, place.lane);
  rt::sync_block();
  const float of_one = 1.0f / static_cast<float>(place.size);
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    float sum = 0.0f, squares = 0.0f;
    RT_UNROLL for (int w = 0; w < K::kWarps; ++w) {
      sum += units_of_warp(w) * Two::read(shared, w, 0, place.lane, e);
    }
    mean[e] = sum * of_one;
    RT_UNROLL for (int w = 0; w < K::kWarps; ++w) {
      const float apart = Two::read(shared, w, 0, place.lane, e) - mean[e];
      squares += Two::read(shared, w, 1, place.lane, e) + units_of_warp(w) * apart * apart;
    }
    rstd[e] = rt::divide(1.0f, rt::square_root(squares * of_one + eps));
  }
}

// ------------------------------------------------------------------------------ Blue's sums

template <int kTiles>
RT_DEVICE void blue_sums(const float (&x)[kTiles][4], float (&sums)[3][2]) {
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    float small = 0.0f, usual = 0.0f, large = 0.0f;
    RT_UNROLL for (int m = 0; m < kTiles; ++m) {
      RT_UNROLL for (int v = e; v < 4; v += 2) {
        const float up = x[m][v] * kSmallScale, down = x[m][v] * kLargeScale;
        small += up * up;
        usual += x[m][v] * x[m][v];
        large += down * down;
      }
    }
    sums[0][e] = over_lanes(small);
    sums[1][e] = over_lanes(usual);
    sums[2][e] = over_lanes(large);
  }
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
