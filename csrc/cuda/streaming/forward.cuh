// Forward, a launch a step (streaming.cuh).
#pragma once

#include "cuda/streaming/product.cuh"

namespace rnnfast::cuda::streaming {

RT_DEVICE int forward_time(const Shape& shape, int direction, int i) {
  return direction ? shape.steps - 1 - i : i;
}

// Stores the state that step i + 1 multiplies, and h_n. If the row has step i (`valid`, a bit for
// each of the lane's columns) they come from the words h, otherwise from h_0.
template <class K>
RT_DEVICE void pass_on(const Forward& a, const Workspace& w, const Place<K>& place, int i, int t,
                       unsigned valid, TileWords<K>& h) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const int d = place.direction, edge = d ? t : t + 1;
  unsigned ends = 0, cuts = 0, waits = 0;  // waits: a row that lacks step i
  RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
    const int column = W::column(place.lane, c);
    const int length = length_of<K>(a.lengths, a.shape, place, column);
    const bool cut = cut_at<K>(a.reset, a.shape, place, edge, column, length);
    const bool end = length == 0 ? i < 0 : i >= 0 && t == (d ? 0 : length - 1);
    ends |= (end ? 1u : 0u) << c;
    cuts |= (cut ? 1u : 0u) << c;
    waits |= column < place.rows && (valid >> c & 1) == 0 ? 1u : 0u;
  }
  if (rt::any(waits != 0)) {
    TileWords<K> h_0;
    fetch<K>(state_track<K>(static_cast<const Stored*>(a.h_0), a.shape, place), true, place, h_0);
    RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
      h[0][j] = valid >> j % W::kColumnsOfLane & 1 ? h[0][j] : h_0[0][j];
    }
  }
  if (rt::any(ends != 0)) {
    put<K>(state_track<K>(static_cast<Stored*>(a.h_n), a.shape, place), place, h, ends);
  }
  RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
    h[0][j] = cuts >> j % W::kColumnsOfLane & 1 ? 0 : h[0][j];
  }
  put_state<K>(w, i + 1, a.shape.groups, place, h);
}

// The columns of the lane's words whose rows have step t.
template <class K>
RT_DEVICE unsigned have_step(const std::int64_t* lengths, const Shape& shape, const Place<K>& place,
                             int t) {
  using W = Words<typename K::Stored>;
  unsigned valid = 0;
  RT_UNROLL for (int c = 0; c < W::kColumnsOfLane; ++c) {
    const int length = length_of<K>(lengths, shape, place, W::column(place.lane, c));
    valid |= (t < length ? 1u : 0u) << c;
  }
  return valid;
}

// h = f(n), for a tile of step i.
template <class K>
RT_DEVICE void activate_tile(const Forward& a, const Workspace& w, const Place<K>& place, int i,
                             int t, unsigned valid, float (&n)[1][4]) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  activate<Stored>(a.nonlinearity, n);
  TileWords<K> h, out;
  // Padding stays 0: an inf would make it a NaN, which the next product spreads.
  RT_UNROLL for (int v = 0; v < 4; ++v) n[0][v] = place.inside(0, v) ? n[0][v] : 0.0f;
  W::from_values(n[0], h[0]);
  RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
    out[0][j] = valid >> j % W::kColumnsOfLane & 1 ? h[0][j] : 0;
  }
  put<K>(Track<K, Stored>(a.y, place, t), place, out);
  pass_on<K>(a, w, place, i, t, valid, h);
}

// Stores the state that the first step multiplies.
template <class Mode>
RT_KERNEL(kThreads)
begin_kernel(Step<Forward> step) {
  using K = Tile<Mode>;
  const Workspace& w = step.workspace;
  const Strip strip(w, step.tiles);
  for_own_tiles(w, strip, step.tiles, [&](int tile) {
    const Place<K> place(step.problem.shape, tile, strip.slice);
    TileWords<K> h = {};
    const int t = forward_time(step.problem.shape, place.direction, -1);
    pass_on<K>(step.problem, w, place, -1, t, 0, h);
  });
}

// p of a tile of step i, loaded before it is used.
template <class K>
struct ForwardInputs {
  TileWords<K> p;
  unsigned valid;

  RT_DEVICE void fetch_all(const Forward& a, const Place<K>& place, int t) {
    using Stored = typename K::Stored;
    fetch<K>(Track<K, const Stored>(a.p, place, t), true, place, p);
    valid = have_step<K>(a.lengths, a.shape, place, t);
  }
};

template <class K>
RT_KERNEL(kThreads)
forward_kernel(Step<Forward> step) {
  using Stored = typename K::Stored;
  using T = Tile<typename K::Mode>;
  const Forward& a = step.problem;
  const Workspace& w = step.workspace;
  const Corner<K> corner(w);
  ForwardInputs<T> inputs[K::kRounds] = {};
  const auto for_own_tiles_of_block = [&](auto with) {
    if (rt::thread() / 32 >= K::kOfRound) return;
    RT_UNROLL for (int round = 0; round < K::kRounds; ++round) {
      const int tile = corner.tile_of(round), slice = corner.slice_of(round);
      if (!there(w, tile, slice)) continue;
      const Place<T> place(a.shape, tile, slice);
      with(round, place, forward_time(a.shape, place.direction, step.i));
    }
  };
  // Before the product, so that the loads run beside it, if there are registers for them.
  const auto fetch_inputs = [&] {
    for_own_tiles_of_block(
        [&](int round, const Place<T>& place, int t) { inputs[round].fetch_all(a, place, t); });
  };
  if (K::kRounds == 1) fetch_inputs();
  float sums[K::kRounds][4];
  multiply<K>(w, corner, step.i, a.shape.groups, sums);
  if (K::kRounds > 1) fetch_inputs();
  for_own_tiles_of_block([&](int round, const Place<T>& place, int t) {
    float n[1][4];
    Words<Stored>::to_values(inputs[round].p[0], n[0]);
    RT_UNROLL for (int v = 0; v < 4; ++v) n[0][v] += sums[round][v];
    if (a.gamma != nullptr) {
      float moments[2][2];
      moments_of_tile<T>(n, place, a.shape, moments);
      put_values<T>(w, place, n);
      put_sums<T>(w, place, 0, moments);
    } else {
      activate_tile<T>(a, w, place, step.i, t, inputs[round].valid, n);
    }
  });
}

// Layer norm, and the rest of the step.
template <class Mode>
RT_KERNEL(kThreads)
finish_forward_kernel(Step<Forward> step) {
  using K = Tile<Mode>;
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const Forward& a = step.problem;
  const Workspace& w = step.workspace;
  const Strip strip(w, step.tiles);
  float mean[2], rstd[2];
  moments(w, strip.slice, a.shape, a.norm_eps, mean, rstd);
  for_own_tiles(w, strip, step.tiles, [&](int tile) {
    const Place<K> place(a.shape, tile, strip.slice);
    const int t = forward_time(a.shape, place.direction, step.i);
    const unsigned valid = have_step<K>(a.lengths, a.shape, place, t);
    float n[1][4], gamma[2], beta[2];
    get_values<K>(w, place, n);
    parameter<K>(a.gamma, place, gamma);
    parameter<K>(a.beta, place, beta);
    RT_UNROLL for (int v = 0; v < 4; ++v) {
      n[0][v] = place.inside(0, v) ? (n[0][v] - mean[v % 2]) * rstd[v % 2] : 0.0f;
    }
    TileWords<K> stored;
    W::from_values(n[0], stored[0]);
    RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
      stored[0][j] = valid >> j % W::kColumnsOfLane & 1 ? stored[0][j] : 0;
    }
    put<K>(Track<K, Stored>(a.ahat, place, t), place, stored);
    RT_UNROLL for (int v = 0; v < 4; ++v) n[0][v] = n[0][v] * gamma[v / 2] + beta[v / 2];
    if (tile == 0 && place.lane < 4) {
      RT_UNROLL for (int e = 0; e < 2; ++e) {
        if (place.column(e) >= place.rows) continue;
        const int length = length_of<K>(a.lengths, a.shape, place, place.column(e));
        const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
        a.rstd[point * a.shape.groups + place.group] = t < length ? rstd[e] : 0.0f;
      }
    }
    activate_tile<K>(a, w, place, step.i, t, valid, n);
  });
}

}  // namespace rnnfast::cuda::streaming
