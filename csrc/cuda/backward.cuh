// Backpropagation through time in one block (single_block.cuh).
#pragma once

#include "single_block.cuh"

namespace rnnfast::cuda {

template <class K, bool kNorm, bool kClip>
RT_KERNEL(K::kThreads)
backward_in_block(Backward a) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const Place<K> place(a.shape);
  const int steps = a.shape.steps, d = place.direction, toward = d ? 1 : -1;
  auto* state = K::template at<std::uint32_t>(K::kState);  // da
  [[maybe_unused]] auto* gamma = K::template at<float>(K::kGamma);
  [[maybe_unused]] auto* beta = K::template at<float>(K::kBeta);
  auto* kept = K::template at<float>(K::kKept) + rt::thread();  // this thread's own

  Weights<K> weights;
  load_weights<K, true>(a.w_hh, place, weights);
  [[maybe_unused]] float dgamma[K::kTiles][2] = {}, dbeta[K::kTiles][2] = {};
  if constexpr (kNorm) {
    stage<K>(a.gamma, place, gamma);
    stage<K>(a.beta, place, beta);
    rt::sync_block();
  }
  // Asked for anew at every step: the cache has it, and registers are scarce.
  const auto length = [&](int column) { return length_of<K>(a.lengths, a.shape, place, column); };
  // The last step of a row in this direction, of which the lane has words.
  const auto end = [&](int i) {
    const int steps_of_row = length(W::column(place.lane, i));
    return steps_of_row == 0 ? -1 : d ? 0 : steps_of_row - 1;
  };

  int t = d ? 0 : steps - 1;
  Track<K, const Stored> grad_y(static_cast<const Stored*>(a.grad_y), a.grad_y_strides, place, t);
  Track<K, const Stored> y(static_cast<const Stored*>(a.y), a.y_strides, place, t);
  Track<K, const Stored> ahat(static_cast<const Stored*>(a.ahat), a.ahat_strides, place, t);
  Track<K, Stored> dp(static_cast<Stored*>(a.dp), a.dp_strides, place, t);
  const auto grad_h_n = state_track<K>(static_cast<const Stored*>(a.grad_h_n), a.shape, place);
  const auto dh_0 = state_track<K>(static_cast<Stored*>(a.dh_0), a.shape, place);

  // grad_h_n of the rows that `here` names, added to what is given.
  const auto add_last = [&](const bool (&here)[W::kColumnsOfLane], float (&to)[K::kTiles][4]) {
    TileWords<K> words;
    fetch<K>(grad_h_n, true, place, words);
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      float values[4];
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        words[m][j] = here[j % W::kColumnsOfLane] ? words[m][j] : 0;
      }
      W::to_values(words[m], values);
      RT_UNROLL for (int v = 0; v < 4; ++v) to[m][v] += values[v];
    }
  };

  TileWords<K> next_g, next_h, next_ahat;  // of the next step to begin
  const auto fetch_all = [&](bool there) {
    fetch<K>(grad_y, there, place, next_g);
    fetch<K>(y, there, place, next_h);
    if constexpr (kNorm) fetch<K>(ahat, there, place, next_ahat);
    grad_y.go(toward);
    y.go(toward);
    ahat.go(toward);
  };
  fetch_all(true);
  float carry[K::kTiles][4] = {};  // c_t

  for (int i = 0; i < steps; ++i, t += toward) {
    float dh[K::kTiles][4], h[K::kTiles][4];
    [[maybe_unused]] float normal[K::kTiles][4];
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      W::to_values(next_g[m], dh[m]);
      W::to_values(next_h[m], h[m]);
      if constexpr (kNorm) W::to_values(next_ahat[m], normal[m]);
    }
    bool valid[2], cut[2];
    float rstd[2] = {};
    RT_UNROLL for (int e = 0; e < 2; ++e) {
      const int steps_of_row = length(place.column(e));
      valid[e] = t < steps_of_row;
      cut[e] = cut_at<K>(a.reset, a.shape, place, t + d, place.column(e), steps_of_row) ||
               at_window(a.window, t + d, steps_of_row);
      if (kNorm && valid[e]) {
        const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
        rstd[e] = rt::load(a.rstd + point * a.shape.groups + place.group);
      }
    }
    if (a.grad_h_n != nullptr) {
      bool ends_here[W::kColumnsOfLane], some = false;
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
        ends_here[c] = end(c) == t;
        some = some || ends_here[c];
      }
      if (rt::any(some)) add_last(ends_here, dh);
    }
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) dh[m][v] += carry[m][v];
    }

    if (a.carry != nullptr) {  // for the record
      RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          if (place.column(v % 2) >= place.rows || !place.inside(m, v)) continue;
          const std::int64_t row =
              std::int64_t{t} * a.shape.batch + place.row + place.column(v % 2);
          const std::int64_t unit =
              std::int64_t{place.group} * place.size + place.padded_unit(m, v);
          a.carry[row * a.shape.groups * place.size + unit] = carry[m][v];
        }
      }
    }
    // A row without this step keeps c: not in registers, which are scarce.
    if (a.lengths != nullptr) {
      RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) kept[(m * 4 + v) * K::kThreads] = carry[m][v];
      }
    }

    float scale[2] = {1.0f, 1.0f};
    if constexpr (kClip) {
      float sums[3][2];
      blue_sums(dh, sums);
      Sums<K::kWarps, 3>::add(sums, K::template at<float>(K::kClipSums), place.warp, place.lane);
      RT_UNROLL for (int e = 0; e < 2; ++e) scale[e] = clip_scale(sums, e, a.limit);
    }

    float da[K::kTiles][4];  // dh clipped, then dn, dahat and da
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) da[m][v] = dh[m][v] * scale[v % 2];
    }
    if constexpr (kNorm) {
      if (a.anew) {
        RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
          RT_UNROLL for (int v = 0; v < 4; ++v) {
            const int unit = place.padded_unit(m, v);
            h[m][v] = normal[m][v] * gamma[unit] + beta[unit];
          }
        }
        activate(a.nonlinearity, h);
      }
      differentiate(a.nonlinearity, da, h);
      float sums[2][2] = {};  // of dahat, and of dahat ahat
      RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          da[m][v] = valid[v % 2] && place.inside(m, v) ? da[m][v] : 0.0f;
          dgamma[m][v / 2] += da[m][v] * normal[m][v];
          dbeta[m][v / 2] += da[m][v];
          da[m][v] *= gamma[place.padded_unit(m, v)];
          sums[0][v % 2] += da[m][v];
          sums[1][v % 2] += da[m][v] * normal[m][v];
        }
      }
      RT_UNROLL for (int s = 0; s < 2; ++s) {
        RT_UNROLL for (int e = 0; e < 2; ++e) sums[s][e] = over_lanes(sums[s][e]);
      }
      Sums<K::kWarps, 2>::add(sums, K::template at<float>(K::kNormSums), place.warp, place.lane);
      const float each = 1.0f / static_cast<float>(place.size);
      RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          const float along = normal[m][v] * (sums[1][v % 2] * each);
          da[m][v] = rstd[v % 2] * (da[m][v] - sums[0][v % 2] * each - along);
        }
      }
    } else {
      differentiate(a.nonlinearity, da, h);
    }
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        da[m][v] = valid[v % 2] && place.inside(m, v) ? da[m][v] : 0.0f;
      }
      W::from_values(da[m], out[m]);
    }
    write_state<K>(state + i % 2 * K::kStateWords, place, out);
    put<K>(dp, place, out);
    dp.go(toward);
    rt::sync_block();  // all of da_t is in its half
    // To what a row without this step has kept its da_t of 0 adds nothing.
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) carry[m][v] =
          valid[v % 2] || a.lengths == nullptr ? 0.0f : kept[(m * 4 + v) * K::kThreads];
    }
    Products<K> sums;
    start<K>(weights, state + i % 2 * K::kStateWords, place.lane, carry, sums);
    fetch_all(i + 1 < steps);  // comes in while the tensor cores compute
    finish<K>(sums, carry);
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        // Padding stays 0, whatever an inf makes of it.
        carry[m][v] = cut[v % 2] || !place.inside(m, v) ? 0.0f : carry[m][v];
      }
    }
  }

  if (a.dh_0 != nullptr) {
    if (a.grad_h_n != nullptr) {
      bool empty[W::kColumnsOfLane];
      RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) empty[c] = end(c) < 0;
      add_last(empty, carry);
    }
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) W::from_values(carry[m], out[m]);
    put<K>(dh_0, place, out);
  }
  if constexpr (kNorm) {
    if (a.dgamma == nullptr) return;
    // Over the columns: two in the lane, four lanes side by side.
    const std::int64_t width = std::int64_t{a.shape.groups} * place.size;
    const std::int64_t part = rt::block_x() * width + std::int64_t{place.group} * place.size;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int i = 0; i < 2; ++i) {
        float gain = dgamma[m][i], bias = dbeta[m][i];
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
