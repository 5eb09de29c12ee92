// Arithmetic of layer norm and of clipping: sums over the units of a warp, by shuffles over the
// eight lanes that share two columns.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/rt.cuh"

namespace rnnfast::cuda {

// Sums of the lane's two columns over the units of the warp; all of them at once, since several
// shuffles take as long as one.
template <int kNumber>
RT_DEVICE void over_lanes(float (&sums)[kNumber][2]) {
  RT_UNROLL for (int lanes = 4; lanes < 32; lanes *= 2) {
    RT_UNROLL for (int n = 0; n < kNumber; ++n) {
      RT_UNROLL for (int e = 0; e < 2; ++e) sums[n][e] += rt::shuffle_xor(sums[n][e], lanes);
    }
  }
}

// ------------------------------------------------------------------------------ layer norm

// The sum of squares around the mean of n numbers, from sums around one of them (or around the mean
// of some of them): `squares`, and `sum` of the numbers themselves. The subtraction loses few
// digits, since the number that the sums are around deviates itself: the error is at most 1 + n (or
// 1 + n / some) times the rounding.
RT_DEVICE float around_mean(float squares, float sum, float inv_number) {
  const float rest = squares - sum * (sum * inv_number);
  return rest < 0.0f ? 0.0f : rest;  // a NaN stays one
}

// ------------------------------------------------------------------------------ clipping

// Two sums of squares, of the values times 2^48 and times 2^-72: the first has the digits of norms
// from 2^-98 to 2^15, the second from there to 2^136, which is more than 60000 units can have. A
// limit is at least 1e-30, so no digit of a norm below it matters.
constexpr float kUp = 0x1p48f;
constexpr float kDown = 0x1p-72f;

// Squares of the lane, in the first two of some sums.
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

// Whether a row has a norm from 2^15 on (or inf, or NaN): its values may overflow their type before
// they are clipped.
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
