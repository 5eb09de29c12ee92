// Clipping of a backward pass without layer norm, behind the product.
//
// Clipping scales a row of da_t, so it may as well scale that row of the product. An owner sends
// da_t unclipped, with its sums of squares beside it; when the product is there, so is the scale.
// A row with a norm of 2^15 or more may overflow its type unclipped: then all owners take the step
// once more, in a turn of its own, with that row clipped.
#pragma once

#include "cuda/resident/sums.cuh"

namespace rnnfast::cuda {

template <class K>
class ClipAfterProduct {
 public:
  float scale[2] = {1.0f, 1.0f};  // of the product, for the lane's two columns

  // Beside the state of step i, which sends da. sums: of squares of dh, in the lane.
  template <int kNumber>
  RT_DEVICE void put(int i, const Place<K>& place, float (&sums)[kNumber][2]) {
    over_lanes(sums);
    Exchange<K>::put_sums(kOfClip + i % 2, place, sums);
  }

  RT_DEVICE void keep_sent(const Values<K>& da) {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) sent(m, v) = da[m][v];
    }
  }

  // da of the step that was sent last, clipped.
  RT_DEVICE void clipped(int m, float (&da)[4]) const {
    RT_UNROLL for (int v = 0; v < 4; ++v) da[v] = sent(m, v) * scale[v % 2];
  }

  // Awaits the sums of step i. Returns whether the step is to be taken once more: all owners have
  // the same sums of all rows, so all return the same.
  template <class Rows>
  RT_DEVICE bool await(int i, const Place<K>& place, const Rows& rows, float limit) {
    float squares[2][2];
    Exchange<K>::template await_sums_beside_state<2>(kOfClip + i % 2, i / 2);
    sums_of_all<K>(kOfClip + i % 2, place, squares);
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      scale[e] = clip_scale(squares, e, limit);
      large_[e] = too_large(squares, e) && scale[e] < 1.0f && rows.valid(e);
    }
    return rt::any(large_[0] || large_[1]);
  }

  // Sends the step once more, its large rows clipped: their product needs no scale then.
  RT_DEVICE void put_once_more(int turn, const Place<K>& place) {
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float da[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        float& mine = sent(m, v);
        mine = da[v] = large_[v % 2] ? mine * scale[v % 2] : mine;
      }
      Words<typename K::Stored>::from_values(da, out[m]);
    }
    Exchange<K>::put_state(turn, place, out);
    RT_UNROLL for (int e = 0; e < 2; ++e) scale[e] = large_[e] ? 1.0f : scale[e];
  }

  // A word of the band, for its warps that own nothing: an owner writes it before the band's
  // barrier, they read it behind it. It is written again two turns later, behind another barrier of
  // the band.
  RT_DEVICE static int* retry_flag(int turn, const Place<K>& place) {
    return K::template at<int>(K::kRetryWords) + turn % 2 * K::kBands + place.band;
  }

 private:
  bool large_[2] = {};  // rows that are too large to be sent unclipped
  // In shared memory, where registers are scarce; only this thread uses it.
  float* sent_ = K::template at<float>(K::kGains) + rt::thread();

  RT_DEVICE float& sent(int m, int v) const { return sent_[(m * 4 + v) * K::kOwnerThreads]; }
};

}  // namespace rnnfast::cuda
