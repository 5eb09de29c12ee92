// Backward through layer norm, and clipping before it.
//
// da = rstd (dahat - mean(dahat) - ahat mean(dahat ahat)), with dahat = dn gamma: an exchange of
// two sums. Clipping scales dn, so it may as well scale the sums: then they travel with those of
// clipping (kFuseNormSums). But where a row's norm is 2^15 or more they may overflow: then the row
// is clipped first, and layer norm's sums are exchanged again. Where registers are scarce, layer
// norm's sums always have an exchange of their own.
#pragma once

#include "cuda/resident/sums.cuh"

namespace rnnfast::cuda {

template <class K, bool kClip>
class NormBackward {
 public:
  static constexpr bool kFuseNormSums = !K::kScarce;
  static constexpr int kSums = kFuseNormSums ? 4 : 2;

  RT_DEVICE NormBackward(const Backward& a, const Place<K>& place) : a_(a), place_(place) {}

  // Before the exchange begins, whose barrier orders gamma, beta and the phases.
  RT_DEVICE void begin() {
    stage<K>(a_.gamma, place_, K::template at<float>(K::kGamma));
    stage<K>(a_.beta, place_, K::template at<float>(K::kBeta));
    if (!place_.owner()) return;
    float* const mine = gains();
    RT_UNROLL for (int i = 0; i < 4 * K::kOwned; ++i) mine[i * K::kOwnerThreads] = 0.0f;
    if (kClip && kFuseNormSums && place_.lane == 0) *norm_phase() = 0;
  }

  // n of a value, from ahat.
  RT_DEVICE float normalized(int m, int v, float ahat) const {
    return ahat * gamma(m, v) + K::template at<float>(K::kBeta)[place_.unit_of_block(m, v)];
  }

  // From dn to da, in place, of step i. sums: of squares of dh, in the lane, in the first two.
  template <class Rows>
  RT_DEVICE void step_back(int i, const Rows& rows, const Values<K>& ahat, float (&sums)[kSums][2],
                           Values<K>& da) {
    float mean[2][2];  // of dahat, and of dahat ahat
    if constexpr (kClip) {
      clip(i, ahat, sums, da, mean);
    } else {
      sum_up(ahat, da, mean);
      add_up<K>(kOfNorm, i, place_, mean);
    }
    float* const mine = gains();
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float gain[2] = {}, bias[2] = {};
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        gain[v / 2] += da[m][v] * ahat[m][v];
        bias[v / 2] += da[m][v];
        const float dahat = da[m][v] * gamma(m, v);
        const float along = ahat[m][v] * (mean[1][v % 2] * a_.shape.inv_size);
        const float rest = dahat - mean[0][v % 2] * a_.shape.inv_size - along;
        const bool inside = rows.valid(v % 2) && place_.inside(m, v);
        da[m][v] = inside ? rows.rstd[v % 2] * rest : 0.0f;
      }
      RT_UNROLL for (int k = 0; k < 2; ++k) {
        mine[(m * 4 + k) * K::kOwnerThreads] += gain[k];
        mine[(m * 4 + 2 + k) * K::kOwnerThreads] += bias[k];
      }
    }
  }

  // dgamma and dbeta of the slice.
  RT_DEVICE void put_gains() const {
    if (a_.dgamma == nullptr) return;
    const std::int64_t width = std::int64_t{a_.shape.groups} * place_.size;
    const std::int64_t part = place_.slice * width + std::int64_t{place_.group} * place_.size;
    const float* const mine = gains();
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int k = 0; k < 2; ++k) {
        float gain = mine[(m * 4 + k) * K::kOwnerThreads];
        float bias = mine[(m * 4 + 2 + k) * K::kOwnerThreads];
        // Over the columns: two in the lane, of four lanes side by side.
        RT_UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
          gain += rt::shuffle_xor(gain, lanes);
          bias += rt::shuffle_xor(bias, lanes);
        }
        if (place_.lane % 4 != 0 || !place_.inside(m, 2 * k)) continue;
        const std::int64_t unit = part + place_.unit + m * kTileUnits + k * 8;
        a_.dgamma[unit] = gain;
        if (a_.dbeta != nullptr) a_.dbeta[unit] = bias;
      }
    }
  }

 private:
  const Backward& a_;
  const Place<K>& place_;
  // dgamma and dbeta of a tile's two units, in shared memory, where registers are scarce; only this
  // thread uses them.
  RT_DEVICE float* gains() const {
    return K::template at<float>(K::kGains) + rt::opaque(rt::thread());
  }

  RT_DEVICE float gamma(int m, int v) const {
    return K::template at<float>(K::kGamma)[place_.unit_of_block(m, v)];
  }

  // How often layer norm's sums had an exchange of their own, though they need none: a word of the
  // warp. Lane 0 writes it behind sync_warp, all lanes have read it before.
  RT_DEVICE int* norm_phase() const {
    return K::template at<int>(K::kRetryWords) + rt::opaque(place_.warp);
  }

  RT_DEVICE void sum_up(const Values<K>& ahat, const Values<K>& da, float (&mean)[2][2]) const {
    RT_UNROLL for (int n = 0; n < 2; ++n) mean[n][0] = mean[n][1] = 0.0f;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        const float dahat = da[m][v] * gamma(m, v);
        mean[0][v % 2] += dahat;
        mean[1][v % 2] += dahat * ahat[m][v];
      }
    }
  }

  // Clips da; mean: layer norm's sums over all units, of the clipped da.
  RT_DEVICE void clip(int i, const Values<K>& ahat, float (&sums)[kSums][2], Values<K>& da,
                      float (&mean)[2][2]) const {
    if constexpr (kFuseNormSums) {
      sum_up(ahat, da, mean);
      RT_UNROLL for (int n = 0; n < 2; ++n) {
        RT_UNROLL for (int e = 0; e < 2; ++e) sums[2 + n][e] = mean[n][e];
      }
    }
    add_up<K>(kOfClip, i, place_, sums);
    float factor[2];
    bool clip_first[2];  // the row is clipped before layer norm's sums are taken
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      factor[e] = clip_scale(sums, e, a_.clip);
      clip_first[e] = !kFuseNormSums || (too_large(sums, e) && factor[e] < 1.0f);
      if constexpr (kFuseNormSums) {
        RT_UNROLL for (int n = 0; n < 2; ++n) mean[n][e] = sums[2 + n][e];
      }
    }
    // All owners have the same sums, so all take this branch or none. The sums of other rows are
    // the same numbers again.
    if (!kFuseNormSums || rt::any(clip_first[0] || clip_first[1])) {
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] *= clip_first[v % 2] ? factor[v % 2] : 1.0f;
      }
      RT_UNROLL for (int e = 0; e < 2; ++e) factor[e] = clip_first[e] ? 1.0f : factor[e];
      sum_up(ahat, da, mean);
      const int phase = kFuseNormSums ? *norm_phase() : i;
      add_up<K>(kOfNorm, phase, place_, mean);
      rt::sync_warp();  // all lanes have read norm_phase, which lane 0 writes
      if (kFuseNormSums && place_.lane == 0) *norm_phase() = phase + 1;
    }
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] *= factor[v % 2];
    }
    RT_UNROLL for (int n = 0; n < 2; ++n) {
      RT_UNROLL for (int e = 0; e < 2; ++e) mean[n][e] *= factor[e];
    }
  }
};

}  // namespace rnnfast::cuda
