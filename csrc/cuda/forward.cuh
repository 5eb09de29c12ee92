// Forward through time in one block (single_block.cuh).
#pragma once

#include "single_block.cuh"

namespace rnnfast::cuda {

template <class K, bool kNorm>
RT_KERNEL(K::kThreads)
forward_in_block(Forward a) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const Place<K> place(a.shape);
  const int steps = a.shape.steps, d = place.direction, toward = d ? -1 : 1;
  auto* state = K::template at<std::uint32_t>(K::kState);
  [[maybe_unused]] auto* gamma = K::template at<float>(K::kGamma);
  [[maybe_unused]] auto* beta = K::template at<float>(K::kBeta);

  Weights<K> weights;
  load_weights<K, false>(a.w_hh, place, weights);
  if constexpr (kNorm) {
    stage<K>(a.gamma, place, gamma);
    stage<K>(a.beta, place, beta);
  }
  int lengths[W::kColumnsOfLane];  // of the rows that the lane has words of
  RT_UNROLL for (int i = 0; i < W::kColumnsOfLane; ++i) {
    lengths[i] = length_of<K>(a.lengths, a.shape, place, W::column(place.lane, i));
  }

  int t = d ? steps - 1 : 0;
  Track<K, const Stored> p(static_cast<const Stored*>(a.p), a.p_strides, place, t);
  Track<K, Stored> y(static_cast<Stored*>(a.y), a.y_strides, place, t);
  Track<K, Stored> ahat(static_cast<Stored*>(a.ahat), a.y_strides, place, t);
  const auto h_0 = state_track<K>(static_cast<const Stored*>(a.h_0), a.shape, place);
  const auto h_n = state_track<K>(static_cast<Stored*>(a.h_n), a.shape, place);

  // h: the state, which steps without a row leave as it is. next: p of the next step to begin.
  TileWords<K> h, next;
  fetch<K>(h_0, true, place, h);
  fetch<K>(p, true, place, next);
  // What the step sees of the state: nothing from before a reset.
  const auto write_seen = [&](int half, const bool (&cut)[W::kColumnsOfLane]) {
    TileWords<K> seen;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        seen[m][j] = cut[j % W::kColumnsOfLane] ? 0 : h[m][j];
      }
    }
    write_state<K>(state + half * K::kStateWords, place, seen);
  };
  const auto cuts_before = [&](int step, bool (&cut)[W::kColumnsOfLane]) {
    RT_UNROLL for (int i = 0; i < W::kColumnsOfLane; ++i) {
      const int column = W::column(place.lane, i);
      cut[i] = cut_at<K>(a.reset, a.shape, place, step + d, column, lengths[i]);
    }
  };
  bool cut[W::kColumnsOfLane];
  cuts_before(t, cut);
  write_seen(0, cut);

  for (int i = 0; i < steps; ++i, t += toward) {
    rt::sync_block();  // all of h_{t-1} is in its half
    // p, then a, ahat, n and h.
    float n[K::kTiles][4];
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) W::to_values(next[m], n[m]);
    Products<K> sums;
    start<K>(weights, state + i % 2 * K::kStateWords, place.lane, n, sums);
    p.go(toward);
    fetch<K>(p, i + 1 < steps, place, next);  // comes in while this step computes
    cuts_before(t + toward, cut);             // of the next step, which sees what this one writes
    finish<K>(sums, n);
    if constexpr (kNorm) {
      float mean[2], rstd[2];
      moments<K>(n, place, a.norm_eps, K::template at<float>(K::kNormSums), mean, rstd);
      TileWords<K> stored;
      RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          const float centred = n[m][v] - mean[v % 2];
          n[m][v] = place.inside(m, v) ? centred * rstd[v % 2] : 0.0f;
        }
        W::from_values(n[m], stored[m]);
        RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
          stored[m][j] = t < lengths[j % W::kColumnsOfLane] ? stored[m][j] : 0;
        }
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          const int unit = place.padded_unit(m, v);
          n[m][v] = n[m][v] * gamma[unit] + beta[unit];
        }
      }
      put<K>(ahat, place, stored);
      ahat.go(toward);
      if (place.warp == 0 && place.lane < 4) {
        RT_UNROLL for (int e = 0; e < 2; ++e) {
          if (place.column(e) >= place.rows) continue;
          const int length = length_of<K>(a.lengths, a.shape, place, place.column(e));
          const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
          a.rstd[point * a.shape.groups + place.group] = t < length ? rstd[e] : 0.0f;
        }
      }
    }
    activate(a.nonlinearity, n);
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      // Padding stays 0: of an inf it would have become a NaN, which the next product spreads.
      RT_UNROLL for (int v = 0; v < 4; ++v) n[m][v] = place.inside(m, v) ? n[m][v] : 0.0f;
      W::from_values(n[m], out[m]);
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        const bool valid = t < lengths[j % W::kColumnsOfLane];
        h[m][j] = valid ? out[m][j] : h[m][j];
        out[m][j] = valid ? out[m][j] : 0;
      }
    }
    write_seen((i + 1) % 2, cut);
    put<K>(y, place, out);
    y.go(toward);
  }
  put<K>(h_n, place, h);
}

}  // namespace rnnfast::cuda
