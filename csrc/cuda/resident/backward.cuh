// Backpropagation through time (kernel.cuh).
#pragma once

#include "cuda/resident/kernel.cuh"

namespace rnnfast::cuda {

template <class K, bool kNorm, bool kClip>
RT_KERNEL(K::kThreads)
backward_kernel(Backward a) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const Place<K> place(a.shape);
  const int steps = a.shape.steps, d = place.direction;
  [[maybe_unused]] auto* gamma = K::template at<float>(K::kGamma);
  [[maybe_unused]] auto* beta = K::template at<float>(K::kBeta);
  constexpr int kOwnerThreads = 32 * K::kOwners;
  // Clips while the product is under way: what is sent is da before that.
  constexpr bool kLate = kClip && !kNorm;
  // Layer norm's sums are exchanged with those of clipping, for which registers must not be scarce.
  constexpr bool kTogether = kNorm && !K::kScarce;
  constexpr int kSums = kTogether ? 4 : 2;
  // This thread's own, not in registers, which are scarce: c of rows that lack a step; dgamma and
  // dbeta of a tile's two units; what was sent.
  auto* kept = K::template at<float>(K::kKept) + rt::thread();
  [[maybe_unused]] auto* gains = K::template at<float>(K::kGains) + rt::thread();
  [[maybe_unused]] auto* sent = gains;

  Weights<K> weights;
  load_weights<K, true>(a.w_hh, place, weights);
  if constexpr (kNorm) {
    stage<K>(a.gamma, place, gamma);
    stage<K>(a.beta, place, beta);
    if (place.owner()) {
      RT_UNROLL for (int i = 0; i < 4 * K::kOwned; ++i) gains[i * kOwnerThreads] = 0.0f;
    }
  }
  // How often layer norm's sums had an exchange of their own, where they need not: a word of the
  // warp.
  const auto apart = [&] { return K::template at<int>(K::kAgain) + rt::opaque(place.warp); };
  if (kClip && kTogether && place.owner() && place.lane == 0) *apart() = 0;
  begin_exchange<K, kSums>(place);
  const auto length = [&](int column) { return length_of<K>(a.lengths, a.shape, place, column); };
  // The last step of a row in this direction, of which the lane has words.
  const auto end = [&](int i) {
    const int steps_of_row = length(W::column(place.lane, i));
    return steps_of_row == 0 ? -1 : d ? 0 : steps_of_row - 1;
  };

  // Of step i in the order of the loop.
  const auto time_of = [&](int i) { return d ? i : steps - 1 - i; };
  const int first = time_of(0);
  Track<K, const Stored> grad_y(a.grad_y, place, first);
  Track<K, const Stored> y(a.y, place, first);
  Track<K, const Stored> ahat(a.ahat, place, first);
  Track<K, Stored> dp(a.dp, place, first);

  // grad_h_n of the rows that `here` names, added to what is given.
  const auto add_last = [&](const bool (&here)[W::kColumnsOfLane], float (&to)[K::kOwned][4]) {
    const auto* grad_h_n = static_cast<const Stored*>(a.grad_h_n);
    TileWords<K> words;
    fetch<K>(state_track<K>(grad_h_n, a.shape, place), true, place, words);
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float values[4];
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        words[m][j] = here[j % W::kColumnsOfLane] ? words[m][j] : 0;
      }
      W::to_values(words[m], values);
      RT_UNROLL for (int v = 0; v < 4; ++v) to[m][v] += values[v];
    }
  };

  TileWords<K> next_g, next_h, next_ahat;  // of the next step to begin
  const auto fetch_all = [&] {
    fetch<K>(grad_y, true, place, next_g);
    fetch<K>(y, true, place, next_h);
    if constexpr (kNorm) fetch<K>(ahat, true, place, next_ahat);
    grad_y.go(!d);
    y.go(!d);
    ahat.go(!d);
  };
  // What lengths, resets and the window say of a step, which is looked up during the one before.
  // In bits, since registers are scarce: of the columns of the values whether the row has the step,
  // and whether no gradient crosses its edge; of those of the words whether it is the row's last.
  struct Step {
    unsigned bits;
    float rstd[2];

    RT_DEVICE bool valid(int e) const { return bits >> e & 1; }
    RT_DEVICE bool cut(int e) const { return bits >> (2 + e) & 1; }
    RT_DEVICE bool last(int c) const { return bits >> (4 + c) & 1; }
  };
  const auto look_up = [&](int t) {
    Step step = {};
    const bool edge = a.window > 0 && t + d > 0 && (t + d) % a.window == 0;
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      const int steps_of_row = length(place.column(e));
      const bool valid = t < steps_of_row;
      const bool cut = cut_at<K>(a.reset, a.shape, place, t + d, place.column(e), steps_of_row) ||
                       (edge && t + d < steps_of_row);
      step.bits |= (valid ? 1u : 0u) << e | (cut ? 4u : 0u) << e;
      if (kNorm && valid) {
        const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
        step.rstd[e] = rt::load(a.rstd + point * a.shape.groups + place.group);
      }
    }
    if (a.grad_h_n != nullptr) {
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
        step.bits |= (end(c) == t ? 16u : 0u) << c;
      }
    }
    return step;
  };
  fetch_all();
  Step next = look_up(first);
  Values<K> carry = {};  // c_t

  // Of clipping late: by what a row is scaled, and which rows are too large to be sent as they are.
  float scale[2] = {1.0f, 1.0f};
  bool large[2] = {};
  const auto put_dp = [&] {
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float da[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        da[v] = sent[(m * 4 + v) * kOwnerThreads] * scale[v % 2];
      }
      W::from_values(da, out[m]);
    }
    put<K>(dp, place, out);
    dp.go(!d);
  };

  // What layer norm makes of dn, and clipping where there is: da. sums: of squares of dh.
  [[maybe_unused]] const auto clip_through_norm = [&](int i, const Step& step,
                                                      const Values<K>& normal,
                                                      float (&sums)[kSums][2], Values<K>& da) {
    float mean[2][2];
    const auto sum_up = [&] {
      RT_UNROLL for (int n = 0; n < 2; ++n) mean[n][0] = mean[n][1] = 0.0f;
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          const float dahat = da[m][v] * gamma[place.unit_of_block(m, v)];
          mean[0][v % 2] += dahat;
          mean[1][v % 2] += dahat * normal[m][v];
        }
      }
    };
    if constexpr (kTogether || !kClip) sum_up();
    if constexpr (kClip) {
      if constexpr (kTogether) {
        RT_UNROLL for (int n = 0; n < 2; ++n) {
          RT_UNROLL for (int e = 0; e < 2; ++e) sums[2 + n][e] = mean[n][e];
        }
      }
      add_up<K>(kOfClip, i, place, sums);
      float factor[2];
      bool at_once[2];  // whether the row is clipped before those sums are taken
      RT_UNROLL for (int e = 0; e < 2; ++e) {
        factor[e] = clip_scale(sums, e, a.clip);
        at_once[e] = !kTogether || (too_large(sums, e) && factor[e] < 1.0f);
        if constexpr (kTogether) {
          RT_UNROLL for (int n = 0; n < 2; ++n) mean[n][e] = sums[2 + n][e];
        }
      }
      if (!kTogether || rt::any(at_once[0] || at_once[1])) {  // of other rows they come to the same
        RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
          RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] *= at_once[v % 2] ? factor[v % 2] : 1.0f;
        }
        RT_UNROLL for (int e = 0; e < 2; ++e) factor[e] = at_once[e] ? 1.0f : factor[e];
        sum_up();
        const int phase = kTogether ? *apart() : i;
        add_up<K>(kOfNorm, phase, place, mean);
        rt::sync_warp();  // all lanes have read it
        if (kTogether && place.lane == 0) *apart() = phase + 1;
      }
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] *= factor[v % 2];
      }
      RT_UNROLL for (int n = 0; n < 2; ++n) {
        RT_UNROLL for (int e = 0; e < 2; ++e) mean[n][e] *= factor[e];
      }
    } else {
      add_up<K>(kOfNorm, i, place, mean);
    }
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float gain[2] = {}, bias[2] = {};
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        gain[v / 2] += da[m][v] * normal[m][v];
        bias[v / 2] += da[m][v];
        const float dahat = da[m][v] * gamma[place.unit_of_block(m, v)];
        const float along = normal[m][v] * (mean[1][v % 2] * a.shape.inv_size);
        const float rest = dahat - mean[0][v % 2] * a.shape.inv_size - along;
        const bool inside = step.valid(v % 2) && place.inside(m, v);
        da[m][v] = inside ? step.rstd[v % 2] * rest : 0.0f;
      }
      RT_UNROLL for (int i = 0; i < 2; ++i) {
        gains[(m * 4 + i) * kOwnerThreads] += gain[i];
        gains[(m * 4 + 2 + i) * kOwnerThreads] += bias[i];
      }
    }
  };

  // Step i up to da_t: what the owners do.
  const auto make_da = [&](int i, int turn, const Step& step) {
    float da[K::kOwned][4], h[K::kOwned][4];  // da: dh, then dn and da
    [[maybe_unused]] float normal[K::kOwned][4];
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      W::to_values(next_g[m], da[m]);
      W::to_values(next_h[m], h[m]);
      if constexpr (kNorm) W::to_values(next_ahat[m], normal[m]);
    }
    if (a.grad_h_n != nullptr) {
      bool ends[W::kColumnsOfLane];
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) ends[c] = step.last(c);
      if (rt::any(step.bits >= 16)) add_last(ends, da);
    }
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] += carry[m][v];
    }

    if (a.carry != nullptr) {  // for the record
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          if (place.column(v % 2) >= place.rows || !place.inside(m, v)) continue;
          const std::int64_t row =
              std::int64_t{time_of(i)} * a.shape.batch + place.row + place.column(v % 2);
          const std::int64_t unit =
              std::int64_t{place.group} * place.size + place.padded_unit(m, v);
          a.carry[row * a.shape.groups * place.size + unit] = carry[m][v];
        }
      }
    }

    // A row without this step keeps c.
    if (a.lengths != nullptr) {
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) kept[(m * 4 + v) * kOwnerThreads] = carry[m][v];
      }
    }

    [[maybe_unused]] float sums[kSums][2];  // of squares of dh; what layer norm needs
    if constexpr (kClip) squares_of(da, sums);
    if constexpr (kNorm) {
      if (sizeof(Stored) == 2 && a.recompute_state) {
        RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
          RT_UNROLL for (int v = 0; v < 4; ++v) {
            const int unit = place.unit_of_block(m, v);
            h[m][v] = normal[m][v] * gamma[unit] + beta[unit];
          }
        }
        activate<float>(a.nonlinearity, h);  // of h, 1 - h^2 has fewer digits
      }
    }
    differentiate(a.nonlinearity, da, h);
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        da[m][v] = step.valid(v % 2) && place.inside(m, v) ? da[m][v] : 0.0f;
      }
    }
    if constexpr (kNorm) clip_through_norm(i, step, normal, sums, da);
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) W::from_values(da[m], out[m]);
    put_state<K>(turn, place, out);
    if constexpr (kLate) {  // while the state is on its way
      over_lanes(sums);
      put_sums<K>(kOfClip + i % 2, place, sums);
      if (i > 0) put_dp();  // of the step before
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) sent[(m * 4 + v) * kOwnerThreads] = da[m][v];
      }
    } else {
      put<K>(dp, place, out);
      dp.go(!d);
    }
  };
  // The step again, of which rows that are too large are clipped now.
  const auto put_once_more = [&](int turn) {
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float da[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        float& mine = sent[(m * 4 + v) * kOwnerThreads];
        mine = da[v] = large[v % 2] ? mine * scale[v % 2] : mine;
      }
      W::from_values(da, out[m]);
    }
    put_state<K>(turn, place, out);
    RT_UNROLL for (int e = 0; e < 2; ++e) scale[e] = large[e] ? 1.0f : scale[e];
  };
  // For warps that own nothing, a word of the band: written before its barrier, read behind it.
  [[maybe_unused]] const auto told = [&](int turn) {
    return K::template at<int>(K::kAgain) + turn % 2 * K::kBands + place.band;
  };

  bool again = false;  // whether a step is taken once more
  Step step = next;
  for (int i = 0, turn = 0; i < steps; ++turn) {
    const bool once_more = again;
    again = false;
    if (place.owner()) {
      if (once_more) {
        put_once_more(turn);
      } else {
        step = next;
        make_da(i, turn, step);
      }
    }
    await_state<K>(turn);  // all of da_t is in its half
    // What a row keeps that has not this step: to it, its da_t of 0 adds nothing.
    const auto keeps = [&](int m, int v, float other) {
      const bool there = step.valid(v % 2) || a.lengths == nullptr;
      return there ? other : kept[(m * 4 + v) * kOwnerThreads];
    };
    if (place.owner()) {
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) carry[m][v] = kLate ? 0.0f : keeps(m, v, 0.0f);
      }
    }
    Products<K> sums;
    start<K>(weights, state_of<K>(turn), place, carry, sums);
    expect_state<K>(turn, place);
    if (place.owner() && !once_more && i + 1 < steps) {  // comes in while the tensor cores compute
      fetch_all();
      next = look_up(time_of(i + 1));
    }
    finish<K>(sums, place, carry, [&] {
      if constexpr (kLate) {
        if (place.owner() && !once_more) {
          float squares[2][2];
          await_sums<K, 2>(kOfClip + i % 2, i / 2);
          sums_of_all<K>(kOfClip + i % 2, place, squares);
          RT_UNROLL for (int e = 0; e < 2; ++e) {
            scale[e] = clip_scale(squares, e, a.clip);
            large[e] = too_large(squares, e) && scale[e] < 1.0f && step.valid(e);
          }
          again = rt::any(large[0] || large[1]);
        }
        if (!K::kAllOwn && place.part == 0 && place.lane == 0) *told(turn) = again;
      }
    });
    if (kLate && !K::kAllOwn && !place.owner()) again = *told(turn);
    if (!again) ++i;
    if (!place.owner()) continue;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        if (kLate) carry[m][v] = keeps(m, v, carry[m][v] * scale[v % 2]);
        // Padding stays 0, whatever an inf makes of it.
        carry[m][v] = step.cut(v % 2) || !place.inside(m, v) ? 0.0f : carry[m][v];
      }
    }
  }

  if (!place.owner()) return;
  if (kLate) put_dp();  // of the last step
  if (a.dh_0 != nullptr) {
    if (a.grad_h_n != nullptr) {
      bool empty[W::kColumnsOfLane];
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) empty[c] = end(c) < 0;
      add_last(empty, carry);
    }
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) W::from_values(carry[m], out[m]);
    put<K>(state_track<K>(static_cast<Stored*>(a.dh_0), a.shape, place), place, out);
  }
  if constexpr (kNorm) {
    if (a.dgamma == nullptr) return;
    // Over the columns: two in the lane, four lanes side by side.
    const std::int64_t width = std::int64_t{a.shape.groups} * place.size;
    const std::int64_t part = place.slice * width + std::int64_t{place.group} * place.size;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int i = 0; i < 2; ++i) {
        float gain = gains[(m * 4 + i) * kOwnerThreads];
        float bias = gains[(m * 4 + 2 + i) * kOwnerThreads];
        RT_UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
          gain += rt::shuffle_xor(gain, lanes);
          bias += rt::shuffle_xor(bias, lanes);
        }
        if (place.lane % 4 != 0 || !place.inside(m, 2 * i)) continue;
        const std::int64_t unit = part + place.unit + m * kTileUnits + i * 8;
        a.dgamma[unit] = gain;
        if (a.dbeta != nullptr) a.dbeta[unit] = bias;
      }
    }
  }
}

}  // namespace rnnfast::cuda
