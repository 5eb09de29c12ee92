// Backpropagation through time (kernel.cuh).
#pragma once

#include "kernel.cuh"

namespace rnnfast::cuda {

// kClip: whether it can clip, which it does where there is a limit.
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
  // This thread's own: c of rows that lack a step; dgamma and dbeta of a tile's two units. They are
  // not in registers, which are scarce.
  auto* kept = K::template at<float>(K::kKept) + rt::thread();
  [[maybe_unused]] auto* gains = K::template at<float>(K::kGains) + rt::thread();

  Weights<K> weights;
  load_weights<K, true>(a.w_hh, place, weights);
  if constexpr (kNorm) {
    stage<K>(a.gamma, place, gamma);
    stage<K>(a.beta, place, beta);
    if (place.owner()) {
      RT_UNROLL for (int i = 0; i < 4 * K::kOwned; ++i) gains[i * kOwnerThreads] = 0.0f;
    }
  }
  begin_exchange<K>(place);
  const auto length = [&](int column) { return length_of<K>(a.lengths, a.shape, place, column); };
  // The last step of a row in this direction, of which the lane has words.
  const auto end = [&](int i) {
    const int steps_of_row = length(W::column(place.lane, i));
    return steps_of_row == 0 ? -1 : d ? 0 : steps_of_row - 1;
  };

  // Of step i in the order of the loop.
  const auto time_of = [&](int i) { return d ? i : steps - 1 - i; };
  const int first = time_of(0);
  Track<K, const Stored> grad_y(static_cast<const Stored*>(a.grad_y), a.grad_y_strides, place,
                                first);
  Track<K, const Stored> y(static_cast<const Stored*>(a.y), a.y_strides, place, first);
  Track<K, const Stored> ahat(static_cast<const Stored*>(a.ahat), a.ahat_strides, place, first);
  Track<K, Stored> dp(static_cast<Stored*>(a.dp), a.dp_strides, place, first);

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

  // Step i up to da_t: what the owners do.
  const auto make_da = [&](int i, const Step& step) {
    float dh[K::kOwned][4], h[K::kOwned][4];
    [[maybe_unused]] float normal[K::kOwned][4];
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      W::to_values(next_g[m], dh[m]);
      W::to_values(next_h[m], h[m]);
      if constexpr (kNorm) W::to_values(next_ahat[m], normal[m]);
    }
    if (a.grad_h_n != nullptr) {
      bool ends[W::kColumnsOfLane];
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) ends[c] = step.last(c);
      if (rt::any(step.bits >= 16)) add_last(ends, dh);
    }
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) dh[m][v] += carry[m][v];
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

    float scale[2] = {1.0f, 1.0f};
    if (kClip && a.limit > 0) {
      float sums[3][2];
      blue_sums(dh, sums);
      add_up<K>(sums, i, place);
      RT_UNROLL for (int e = 0; e < 2; ++e) scale[e] = clip_scale(sums, e, a.limit);
    }

    float da[K::kOwned][4];  // dh clipped, then dn, dahat and da
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] = dh[m][v] * scale[v % 2];
    }
    if constexpr (kNorm) {
      if (a.anew) {
        RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
          RT_UNROLL for (int v = 0; v < 4; ++v) {
            const int unit = place.unit_of_block(m, v);
            h[m][v] = normal[m][v] * gamma[unit] + beta[unit];
          }
        }
        activate<float>(a.nonlinearity, h);  // of h, 1 - h^2 has fewer digits
      }
      differentiate(a.nonlinearity, da, h);
      float sums[2][2] = {};  // of dahat, and of dahat ahat
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        float gain[2] = {}, bias[2] = {};
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          da[m][v] = step.valid(v % 2) && place.inside(m, v) ? da[m][v] : 0.0f;
          gain[v / 2] += da[m][v] * normal[m][v];
          bias[v / 2] += da[m][v];
          da[m][v] *= gamma[place.unit_of_block(m, v)];
          sums[0][v % 2] += da[m][v];
          sums[1][v % 2] += da[m][v] * normal[m][v];
        }
        RT_UNROLL for (int i = 0; i < 2; ++i) {
          gains[(m * 4 + i) * kOwnerThreads] += gain[i];
          gains[(m * 4 + 2 + i) * kOwnerThreads] += bias[i];
        }
      }
      over_lanes(sums);
      add_up<K>(sums, i, place);
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          const float along = normal[m][v] * (sums[1][v % 2] * a.shape.each);
          da[m][v] = step.rstd[v % 2] * (da[m][v] - sums[0][v % 2] * a.shape.each - along);
        }
      }
    } else {
      differentiate(a.nonlinearity, da, h);
    }
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        da[m][v] = step.valid(v % 2) && place.inside(m, v) ? da[m][v] : 0.0f;
      }
      W::from_values(da[m], out[m]);
    }
    put_state<K>(i, place, out);
    put<K>(dp, place, out);
    dp.go(!d);
  };

  for (int i = 0; i < steps; ++i) {
    const Step step = next;
    if (place.owner()) make_da(i, step);
    await_state<K>(i);  // all of da_t is in its half
    // To what a row without this step has kept its da_t of 0 adds nothing.
    if (place.owner()) {
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) carry[m][v] =
            step.valid(v % 2) || a.lengths == nullptr ? 0.0f : kept[(m * 4 + v) * kOwnerThreads];
      }
    }
    Products<K> sums;
    start<K>(weights, state_of<K>(i), place, carry, sums);
    expect_state<K>(i, place);
    if (place.owner() && i + 1 < steps) {  // comes in while the tensor cores compute
      fetch_all();
      next = look_up(time_of(i + 1));
    }
    finish<K>(sums, place, carry);
    if (!place.owner()) continue;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        // Padding stays 0, whatever an inf makes of it.
        carry[m][v] = step.cut(v % 2) || !place.inside(m, v) ? 0.0f : carry[m][v];
      }
    }
  }

  if (!place.owner()) return;
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
