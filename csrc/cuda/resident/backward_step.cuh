// An owner's work in a time step of backward, beside the product.
#pragma once

#include "cuda/device/math.cuh"
#include "cuda/device/place.cuh"
#include "cuda/resident/clipping.cuh"
#include "cuda/resident/norm_backward.cuh"
#include "cuda/resident/product.cuh"

namespace rnnfast::cuda {

// Facts about the rows of a step, from lengths, resets and the window. In bits, since registers are
// scarce: for the columns of the lane's values, whether the row has the step, and whether no
// gradient crosses its edge; for the columns of its words, whether it is the row's last step.
struct StepRows {
  unsigned bits;
  float rstd[2];

  RT_DEVICE bool valid(int e) const { return bits >> e & 1; }
  RT_DEVICE bool cut(int e) const { return bits >> (2 + e) & 1; }
  RT_DEVICE bool last(int c) const { return bits >> (4 + c) & 1; }
  RT_DEVICE bool any_last() const { return bits >= 16; }
};

// What an owner keeps from one step to the next. The arrays are apart from BackwardStep, which
// refers to the place and to the arguments: until all loops over an array are unrolled, nvcc keeps
// its struct in memory, and with it all that the struct refers to.
template <class K>
struct OwnerData {
  Values<K> carry = {};                         // c_t
  TileWords<K> next_grad_y, next_y, next_ahat;  // of the next step to begin
  StepRows next_rows, rows;                     // of that step, and of this one
  ClipAfterProduct<K> clip;
};

// Steps are counted in the order of the loop: step 0 is the last in time, or the first if the
// direction is 1.
template <class K, bool kNorm, bool kClip>
class BackwardStep {
 public:
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  using Norm = NormBackward<K, kClip>;
  static constexpr bool kClipAfterProduct = kClip && !kNorm;
  static constexpr int kSums = kNorm ? Norm::kSums : 2;

  RT_DEVICE BackwardStep(const Backward& a, const Place<K>& place, OwnerData<K>& own)
      : a_(a),
        place_(place),
        own_(own),
        norm_(a, place),
        grad_y_(a.grad_y, place, time_of(0)),
        y_(a.y, place, time_of(0)),
        ahat_(a.ahat, place, time_of(0)),
        dp_(a.dp, place, time_of(0)) {}

  // Before the exchange begins.
  RT_DEVICE void begin() {
    if constexpr (kNorm) norm_.begin();
  }

  // Loads the inputs of step i: used one step later, so that the loads run beside the product.
  RT_DEVICE void fetch_inputs(int i) {
    fetch<K>(grad_y_, true, place_, own_.next_grad_y);
    fetch<K>(y_, true, place_, own_.next_y);
    if constexpr (kNorm) fetch<K>(ahat_, true, place_, own_.next_ahat);
    grad_y_.go(!place_.direction);
    y_.go(!place_.direction);
    ahat_.go(!place_.direction);
    own_.next_rows = look_up(time_of(i));
  }

  // Step i up to da_t, which goes into the state of a turn and to dp.
  RT_DEVICE void make_da(int i, int turn) {
    own_.rows = own_.next_rows;
    Values<K> da, h;  // da: dh, then dn and da
    [[maybe_unused]] Values<K> ahat;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      W::to_values(own_.next_grad_y[m], da[m]);
      W::to_values(own_.next_y[m], h[m]);
      if constexpr (kNorm) W::to_values(own_.next_ahat[m], ahat[m]);
    }
    if (a_.grad_h_n != nullptr) {
      bool ends[W::kColumnsOfLane];
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) ends[c] = own_.rows.last(c);
      if (rt::any(own_.rows.any_last())) add_grad_h_n(ends, da);
    }
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] += own_.carry[m][v];
    }
    if (a_.carry != nullptr) put_carry(time_of(i));  // for the record
    if (a_.lengths != nullptr) {
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) waiting_carry(m, v) = own_.carry[m][v];
      }
    }

    [[maybe_unused]] float sums[kSums][2];  // of squares of dh; of layer norm
    if constexpr (kClip) squares_of(da, sums);
    if constexpr (kNorm) {
      if (sizeof(Stored) == 2 && a_.recompute_state) recompute_state(ahat, h);
    }
    differentiate(a_.nonlinearity, da, h);
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        da[m][v] = own_.rows.valid(v % 2) && place_.inside(m, v) ? da[m][v] : 0.0f;
      }
    }
    if constexpr (kNorm) norm_.step_back(i, own_.rows, ahat, sums, da);
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) W::from_values(da[m], out[m]);
    Exchange<K>::put_state(turn, place_, out);
    if constexpr (kClipAfterProduct) {  // while the state is on its way
      own_.clip.put(i, place_, sums);
      if (i > 0) put_clipped_dp();  // of the step before, whose scale is known now
      own_.clip.keep_sent(da);
    } else {
      put_dp(out);
    }
  }

  RT_DEVICE void put_once_more(int turn) { own_.clip.put_once_more(turn, place_); }

  // Behind the wait for the state: what the product is added to. da_t of 0 adds nothing to the
  // carry of a row that lacks the step.
  RT_DEVICE void begin_carry() {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        own_.carry[m][v] = kClipAfterProduct ? 0.0f : carry_or_waiting(m, v, 0.0f);
      }
    }
  }

  RT_DEVICE bool await_clip(int i) { return own_.clip.await(i, place_, own_.rows, a_.clip); }

  // Behind the product.
  RT_DEVICE void finish_carry() {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        if (kClipAfterProduct) {
          own_.carry[m][v] = carry_or_waiting(m, v, own_.carry[m][v] * own_.clip.scale[v % 2]);
        }
        // Padding stays 0, even where the product has an inf.
        own_.carry[m][v] = own_.rows.cut(v % 2) || !place_.inside(m, v) ? 0.0f : own_.carry[m][v];
      }
    }
  }

  // Behind the last step.
  RT_DEVICE void finish() {
    if (kClipAfterProduct) put_clipped_dp();
    if (a_.dh_0 != nullptr) {
      if (a_.grad_h_n != nullptr) {
        bool empty[W::kColumnsOfLane];
        RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) empty[c] = last_time(c) < 0;
        add_grad_h_n(empty, own_.carry);
      }
      TileWords<K> out;
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) W::from_values(own_.carry[m], out[m]);
      put<K>(state_track<K>(static_cast<Stored*>(a_.dh_0), a_.shape, place_), place_, out);
    }
    if constexpr (kNorm) norm_.put_gains();
  }

 private:
  const Backward& a_;
  const Place<K>& place_;
  OwnerData<K>& own_;
  Norm norm_;
  Track<K, const Stored> grad_y_, y_, ahat_;
  Track<K, Stored> dp_;

  RT_DEVICE int time_of(int i) const { return place_.direction ? i : a_.shape.steps - 1 - i; }

  RT_DEVICE int length(int column) const {
    return length_of<K>(a_.lengths, a_.shape, place_, column);
  }

  // When a row has its last step in this direction; -1 for an empty row. Column c of the lane's
  // words.
  RT_DEVICE int last_time(int c) const {
    const int steps_of_row = length(W::column(place_.lane, c));
    return steps_of_row == 0 ? -1 : place_.direction ? 0 : steps_of_row - 1;
  }

  RT_DEVICE StepRows look_up(int t) const {
    StepRows rows = {};
    const int d = place_.direction;
    const bool edge = a_.window > 0 && t + d > 0 && (t + d) % a_.window == 0;
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      const int steps_of_row = length(place_.column(e));
      const bool valid = t < steps_of_row;
      const bool cut =
          cut_at<K>(a_.reset, a_.shape, place_, t + d, place_.column(e), steps_of_row) ||
          (edge && t + d < steps_of_row);
      rows.bits |= (valid ? 1u : 0u) << e | (cut ? 4u : 0u) << e;
      if (kNorm && valid) {
        const std::int64_t point = std::int64_t{t} * a_.shape.batch + place_.row + place_.column(e);
        rows.rstd[e] = rt::load(a_.rstd + point * a_.shape.groups + place_.group);
      }
    }
    if (a_.grad_h_n != nullptr) {
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
        rows.bits |= (last_time(c) == t ? 16u : 0u) << c;
      }
    }
    return rows;
  }

  // Adds grad_h_n of the columns that `here` names.
  RT_DEVICE void add_grad_h_n(const bool (&here)[W::kColumnsOfLane], Values<K>& to) const {
    const auto* grad_h_n = static_cast<const Stored*>(a_.grad_h_n);
    TileWords<K> words;
    fetch<K>(state_track<K>(grad_h_n, a_.shape, place_), true, place_, words);
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float values[4];
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        words[m][j] = here[j % W::kColumnsOfLane] ? words[m][j] : 0;
      }
      W::to_values(words[m], values);
      RT_UNROLL for (int v = 0; v < 4; ++v) to[m][v] += values[v];
    }
  }

  // Few passes have a record: every value computes its address again, so that no register keeps it.
  RT_DEVICE void put_carry(int t) const {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        if (place_.column(v % 2) >= place_.rows || !place_.inside(m, v)) continue;
        const std::int64_t row =
            std::int64_t{t} * a_.shape.batch + place_.row + place_.column(v % 2);
        const std::int64_t unit =
            std::int64_t{rt::opaque(place_.group)} * place_.size + place_.padded_unit(m, v);
        a_.carry[row * a_.shape.groups * place_.size + unit] = own_.carry[m][v];
      }
    }
  }

  // h from ahat: 1 - h^2 of a stored h has fewer digits.
  RT_DEVICE void recompute_state(const Values<K>& ahat, Values<K>& h) const {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) h[m][v] = norm_.normalized(m, v, ahat[m][v]);
    }
    activate<float>(a_.nonlinearity, h);
  }

  RT_DEVICE float& waiting_carry(int m, int v) const {
    float* mine = K::template at<float>(K::kWaitingCarry) + rt::opaque(rt::thread());
    return mine[(m * 4 + v) * K::kOwnerThreads];
  }

  // A row that lacks this step keeps its carry.
  RT_DEVICE float carry_or_waiting(int m, int v, float new_carry) const {
    const bool has_step = own_.rows.valid(v % 2) || a_.lengths == nullptr;
    return has_step ? new_carry : waiting_carry(m, v);
  }

  RT_DEVICE void put_clipped_dp() {
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float da[4];
      own_.clip.clipped(m, da);
      W::from_values(da, out[m]);
    }
    put_dp(out);
  }

  RT_DEVICE void put_dp(const TileWords<K>& words) {
    put<K>(dp_, place_, words);
    dp_.go(!place_.direction);
  }
};

}  // namespace rnnfast::cuda
