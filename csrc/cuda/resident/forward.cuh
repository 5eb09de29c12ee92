// Forward through time (kernel.cuh).
#pragma once

#include "cuda/device/math.cuh"
#include "cuda/problem.h"
#include "cuda/resident/product.cuh"
#include "cuda/resident/sums.cuh"

namespace rnnfast::cuda {

template <class K, bool kNorm>
RT_KERNEL(K::kThreads)
forward_kernel(Forward a) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const Place<K> place(a.shape);
  const int steps = a.shape.steps, d = place.direction, toward = d ? -1 : 1;
  [[maybe_unused]] auto* gamma = K::template at<float>(K::kGamma);
  [[maybe_unused]] auto* beta = K::template at<float>(K::kBeta);

  Weights<K> weights;
  load_weights<K, false>(a.w_hh, place, weights);
  if constexpr (kNorm) {
    stage<K>(a.gamma, place, gamma);
    stage<K>(a.beta, place, beta);
  }
  int t = d ? steps - 1 : 0;
  Track<K, const Stored> p(a.p, place, t);
  Track<K, Stored> y(a.y, place, t);
  Track<K, Stored> ahat(a.ahat, place, t);

  // h: the state; a row that lacks a step keeps it. next: p of the next step to begin.
  TileWords<K> h, next;
  fetch<K>(state_track<K>(static_cast<const Stored*>(a.h_0), a.shape, place), true, place, h);
  fetch<K>(p, true, place, next);
  // For the lane's columns: whether the row has step t, and whether a reset lies between it and the
  // step after it, which sees no state then. In bits, since registers are scarce.
  const auto look_up = [&](int t) {
    unsigned bits = 0;
    RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
      const int column = W::column(place.lane, c);
      const int length = length_of<K>(a.lengths, a.shape, place, column);
      const bool cut = cut_at<K>(a.reset, a.shape, place, t + toward + d, column, length);
      bits |= (t < length ? 1u : 0u) << c | (cut ? 4u : 0u) << c;
    }
    return bits;
  };
  const auto has_step = [](unsigned bits, int word) {
    return (bits >> word % W::kColumnsOfLane & 1) != 0;
  };
  const auto put_seen = [&](int i, unsigned bits) {
    TileWords<K> seen;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        seen[m][j] = bits >> (2 + j % W::kColumnsOfLane) & 1 ? 0 : h[m][j];
      }
    }
    Exchange<K>::put_state(i, place, seen);
  };
  Exchange<K>::template begin<>(place);
  if (place.owner()) put_seen(0, look_up(t - toward));

  for (int i = 0; i < steps; ++i, t += toward) {
    Exchange<K>::await_state(i);  // all of h_{t-1} is in its half
    // n: first p, then a, ahat, n and h.
    Values<K> n;
    if (place.owner()) {
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) W::to_values(next[m], n[m]);
    }
    Products<K> sums;
    begin_product<K>(weights, state_of<K>(i), place, n, sums);
    Exchange<K>::expect_state(i, place);
    unsigned bits = 0;
    if (place.owner()) {
      p.go(d);
      fetch<K>(p, i + 1 < steps, place, next);  // comes in while this step computes
      bits = look_up(t);
    }
    finish_product<K>(sums, place, n, [] {});
    if (!place.owner()) continue;
    [[maybe_unused]] TileWords<K> stored;
    [[maybe_unused]] float rstd[2];
    if constexpr (kNorm) {
      float mean[2];
      moments<K>(n, i, place, a.shape, a.norm_eps, mean, rstd);
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        RT_UNROLL for (int v = 0; v < 4; ++v) n[m][v] = (n[m][v] - mean[v % 2]) * rstd[v % 2];
        W::pack(n[m], stored[m]);
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          const int unit = place.unit_of_block(m, v);
          n[m][v] = n[m][v] * gamma[unit] + beta[unit];
        }
      }
    }
    activate<Stored>(a.nonlinearity, n);
    TileWords<K> out;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      // Padding stays 0: an inf would make it a NaN, which the next product spreads.
      RT_UNROLL for (int v = 0; v < 4; ++v) n[m][v] = place.inside(m, v) ? n[m][v] : 0.0f;
      W::from_values(n[m], out[m]);
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        h[m][j] = has_step(bits, j) ? out[m][j] : h[m][j];
        out[m][j] = has_step(bits, j) ? out[m][j] : 0;
      }
    }
    if (K::kBlocks == 1 || i + 1 < steps) put_seen(i + 1, bits);
    put<K>(y, place, out);
    y.go(d);
    if constexpr (kNorm) {  // behind the state, which the other owners wait for
      RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
        W::unpack(stored[m]);
        RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
          stored[m][j] = has_step(bits, j) ? stored[m][j] : 0;
        }
      }
      put<K>(ahat, place, stored);
      ahat.go(d);
      if (place.entry == 0 && place.lane < 4) {
        RT_UNROLL for (int e = 0; e < 2; ++e) {
          if (place.column(e) >= place.rows) continue;
          const int length = length_of<K>(a.lengths, a.shape, place, place.column(e));
          const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
          a.rstd[point * a.shape.groups + place.group] = t < length ? rstd[e] : 0.0f;
        }
      }
    }
  }
  if (!place.owner()) return;
  put<K>(state_track<K>(static_cast<Stored*>(a.h_n), a.shape, place), place, h);
}

}  // namespace rnnfast::cuda
