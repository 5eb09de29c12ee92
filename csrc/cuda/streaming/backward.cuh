// Backpropagation through time, a launch a step (streaming.cuh).
#pragma once

#include "cuda/streaming/product.cuh"

namespace rnnfast::cuda::streaming {

RT_DEVICE int backward_time(const Shape& shape, int direction, int i) {
  return direction ? i : shape.steps - 1 - i;
}

// Facts about a row in step i.
struct Row {
  bool valid;  // it has the step
  bool last;   // it is the row's last one, in the order of forward: grad_h_n is added here
  bool cut;    // no gradient crosses the edge to the step before in this order
  bool begun;  // the step before in this order was the row's first: c is dh_0
};

template <class K>
RT_DEVICE Row row_of(const Backward& a, const Place<K>& place, int i, int column) {
  const int d = place.direction, t = backward_time(a.shape, d, i);
  const int before = backward_time(a.shape, d, i - 1), edge = before + d;
  const int length = length_of<K>(a.lengths, a.shape, place, column);
  Row row;
  row.valid = i < a.shape.steps && t < length;
  row.last = row.valid && t == (d ? 0 : length - 1);
  row.cut = i == 0 || before >= length ||
            cut_at<K>(a.reset, a.shape, place, edge, column, length) ||
            at_window(a.window, edge, length);
  row.begun = i > 0 && length > 0 && before == (d ? length - 1 : 0);
  return row;
}

// Stores da_t of a tile: as the state that the next step multiplies, and as dp.
template <class K>
RT_DEVICE void put_da(const Backward& a, const Workspace& w, const Place<K>& place, int i,
                      const float (&da)[1][4]) {
  using Stored = typename K::Stored;
  TileWords<K> out;
  Words<Stored>::from_values(da[0], out[0]);
  const int t = backward_time(a.shape, place.direction, i);
  put_state<K>(w, i + 1, a.shape.groups, place, out);
  put<K>(Track<K, Stored>(a.dp, place, t), place, out);
}

// The inputs of a tile of step i, loaded before they are used.
template <class K>
struct BackwardInputs {
  TileWords<K> grad_y, y, ahat;

  RT_DEVICE void fetch_all(const Backward& a, const Place<K>& place, int i) {
    using Stored = typename K::Stored;
    const bool has = i < a.shape.steps;
    const int t = backward_time(a.shape, place.direction, i);
    const auto one = [&](const Sequence<const void*>& from, TileWords<K>& to) {
      fetch<K>(Track<K, const Stored>(from, place, t), has, place, to);
    };
    one(a.grad_y, grad_y);
    one(a.y, y);
    if (a.gamma != nullptr) one(a.ahat, ahat);
  }
};

// From c_t of a tile to dh_0, for rows that have begun; for the others to da_t, or to the values
// and sums of the second launch.
template <class K>
RT_DEVICE void step_back(const Backward& a, const Workspace& w, const Place<K>& place, int i,
                         const BackwardInputs<K>& inputs, float (&c)[1][4]) {
  using Stored = typename K::Stored;
  using W = Words<Stored>;
  const int t = backward_time(a.shape, place.direction, i);
  const Row rows[2] = {row_of<K>(a, place, i, place.column(0)),
                       row_of<K>(a, place, i, place.column(1))};
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    // Padding stays 0, even where the product has an inf.
    c[0][v] = rows[v % 2].cut || !place.inside(0, v) ? 0.0f : c[0][v];
  }
  unsigned begun = 0, ends = 0, empty = 0;
  RT_UNROLL for (int k = 0; k < W::kColumnsOfLane; ++k) {
    const int column = W::column(place.lane, k);
    const Row row = row_of<K>(a, place, i, column);
    const int length = length_of<K>(a.lengths, a.shape, place, column);
    begun |= (row.begun ? 1u : 0u) << k;
    ends |= (row.last ? 1u : 0u) << k;
    empty |= (i == 0 && length == 0 ? 1u : 0u) << k;
  }
  TileWords<K> words = {};
  if (a.grad_h_n != nullptr && rt::any((ends | empty) != 0)) {
    fetch<K>(state_track<K>(static_cast<const Stored*>(a.grad_h_n), a.shape, place), true, place,
             words);
  }
  if (a.dh_0 != nullptr && rt::any((begun | empty) != 0)) {
    const auto dh_0 = state_track<K>(static_cast<Stored*>(a.dh_0), a.shape, place);
    TileWords<K> out;
    W::from_values(c[0], out[0]);
    RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
      out[0][j] = empty >> j % W::kColumnsOfLane & 1 ? words[0][j] : out[0][j];
    }
    put<K>(dh_0, place, out, begun | empty);
  }
  if (i == a.shape.steps) return;

  float dh[1][4], h[1][4], values[4];
  RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
    words[0][j] = ends >> j % W::kColumnsOfLane & 1 ? words[0][j] : 0;
  }
  W::to_values(words[0], dh[0]);
  W::to_values(inputs.grad_y[0], values);
  W::to_values(inputs.y[0], h[0]);
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    dh[0][v] += values[v] + c[0][v];
    if (a.carry == nullptr || place.column(v % 2) >= place.rows || !place.inside(0, v)) continue;
    const std::int64_t row = std::int64_t{t} * a.shape.batch + place.row + place.column(v % 2);
    a.carry[(row * a.shape.groups + place.group) * place.size + place.padded_unit(0, v)] = c[0][v];
  }

  if (a.clip > 0) {
    float squares[2][2];
    squares_of(dh, squares);
    over_lanes(squares);
    put_sums<K>(w, place, 0, squares);
  }
  [[maybe_unused]] float ahat[4], gamma[2];
  if (a.gamma != nullptr) {
    W::to_values(inputs.ahat[0], ahat);
    parameter<K>(a.gamma, place, gamma);
    if (a.recompute_state) {
      float beta[2];
      parameter<K>(a.beta, place, beta);
      RT_UNROLL for (int v = 0; v < 4; ++v) h[0][v] = ahat[v] * gamma[v / 2] + beta[v / 2];
      activate<float>(a.nonlinearity, h);  // 1 - h^2 of a stored h has fewer digits
    }
  }
  differentiate(a.nonlinearity, dh, h);
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    dh[0][v] = rows[v % 2].valid && place.inside(0, v) ? dh[0][v] : 0.0f;
  }
  if (a.gamma == nullptr && a.clip <= 0) return put_da<K>(a, w, place, i, dh);
  put_values<K>(w, place, dh);
  if (a.gamma == nullptr) return;
  float sums[4][2] = {};  // of dahat, and of dahat ahat; scaled down
  RT_UNROLL for (int v = 0; v < 4; ++v) {
    const float dahat = dh[0][v] * gamma[v / 2], down = dh[0][v] * kScaledDown * gamma[v / 2];
    sums[0][v % 2] += dahat;
    sums[1][v % 2] += dahat * ahat[v];
    sums[2][v % 2] += down;
    sums[3][v % 2] += down * ahat[v];
  }
  over_lanes(sums);
  put_sums<K>(w, place, 2, sums);
}

template <class K>
RT_KERNEL(kThreads)
backward_kernel(Step<Backward> step) {
  using T = Tile<typename K::Mode>;
  const Backward& a = step.problem;
  const Workspace& w = step.workspace;
  const Corner<K> corner(w);
  BackwardInputs<T> inputs = {};
  const auto for_own_tiles_of_block = [&](auto with) {
    if (rt::thread() / 32 >= K::kOfRound) return;
    RT_UNROLL for (int round = 0; round < K::kRounds; ++round) {
      const int tile = corner.tile_of(round), slice = corner.slice_of(round);
      if (there(w, tile, slice)) with(round, Place<T>(a.shape, tile, slice));
    }
  };
  const auto fetch_inputs = [&](int, const Place<T>& place) { inputs.fetch_all(a, place, step.i); };
  if (K::kRounds == 1) for_own_tiles_of_block(fetch_inputs);
  float sums[K::kRounds][4] = {};
  if (step.i > 0) multiply<K>(w, corner, step.i, a.shape.groups, sums);
  for_own_tiles_of_block([&](int round, const Place<T>& place) {
    if (K::kRounds > 1) fetch_inputs(round, place);
    float c[1][4];
    RT_UNROLL for (int v = 0; v < 4; ++v) c[0][v] = sums[round][v];
    step_back<T>(a, w, place, step.i, inputs, c);
  });
}

// Clipping and layer norm. Both are linear in dh except for the clip scale, so the sums of
// unclipped values are multiplied by it. Where the norm is large those sums may overflow float32:
// then this uses the sums of the scaled-down values.
template <class Mode>
RT_KERNEL(kThreads)
finish_backward_kernel(Step<Backward> step) {
  using K = Tile<Mode>;
  using Stored = typename K::Stored;
  const Backward& a = step.problem;
  const Workspace& w = step.workspace;
  const Strip strip(w, step.tiles);
  const int first = a.clip > 0 ? 0 : 2, end = a.gamma != nullptr ? kMostSums : 2;
  float own[kMostSums] = {}, sums[kMostSums][2];
  for_tiles(w, strip.slice, [&](int, const float* of_tile) {
    RT_UNROLL for (int n = 0; n < kMostSums; ++n) {
      if (n >= first && n < end) own[n] += of_tile[n * kColumns];
    }
  });
  over_block(own, 0, sums);
  float scale[2] = {1.0f, 1.0f}, mean[2], along[2];
  RT_UNROLL for (int e = 0; e < 2; ++e) {
    if (a.clip > 0) scale[e] = clip_scale(sums, e, a.clip);
    const bool large = a.clip > 0 && too_large(sums, e);
    const float factor = (large ? scale[e] / kScaledDown : scale[e]) * a.shape.inv_size;
    mean[e] = (large ? sums[4][e] : sums[2][e]) * factor;
    along[e] = (large ? sums[5][e] : sums[3][e]) * factor;
  }
  for_own_tiles(w, strip, step.tiles, [&](int tile) {
    const Place<K> place(a.shape, tile, strip.slice);
    const int t = backward_time(a.shape, place.direction, step.i);
    float da[1][4];
    get_values<K>(w, place, da);
    RT_UNROLL for (int v = 0; v < 4; ++v) da[0][v] *= scale[v % 2];
    if (a.gamma != nullptr) {
      float ahat[4], gamma[2], gain[2] = {}, bias[2] = {}, rstd[2];
      bool valid[2];
      TileWords<K> words;
      fetch<K>(Track<K, const Stored>(a.ahat, place, t), true, place, words);
      parameter<K>(a.gamma, place, gamma);
      RT_UNROLL for (int e = 0; e < 2; ++e) {
        const int length = length_of<K>(a.lengths, a.shape, place, place.column(e));
        const std::int64_t point = std::int64_t{t} * a.shape.batch + place.row + place.column(e);
        valid[e] = t < length;
        rstd[e] = valid[e] ? rt::load(a.rstd + point * a.shape.groups + place.group) : 0.0f;
      }
      Words<Stored>::to_values(words[0], ahat);
      RT_UNROLL for (int v = 0; v < 4; ++v) {
        gain[v / 2] += da[0][v] * ahat[v];
        bias[v / 2] += da[0][v];
        const float changed = da[0][v] * gamma[v / 2] - mean[v % 2] - ahat[v] * along[v % 2];
        da[0][v] = valid[v % 2] && place.inside(0, v) ? rstd[v % 2] * changed : 0.0f;
      }
      RT_UNROLL for (int k = 0; k < 2; ++k) {  // over the columns: four lanes side by side
        RT_UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
          gain[k] += rt::shuffle_xor(gain[k], lanes);
          bias[k] += rt::shuffle_xor(bias[k], lanes);
        }
        if (a.dgamma == nullptr || place.lane % 4 != 0 || !place.inside(0, 2 * k)) continue;
        const std::int64_t of_slice = std::int64_t{strip.slice} * a.shape.groups + place.group;
        const std::int64_t unit = of_slice * place.size + place.padded_unit(0, 2 * k);
        a.dgamma[unit] = gain[k] + (step.i > 0 ? a.dgamma[unit] : 0.0f);
        if (a.dbeta == nullptr) continue;
        a.dbeta[unit] = bias[k] + (step.i > 0 ? a.dbeta[unit] : 0.0f);
      }
    }
    put_da<K>(a, w, place, step.i, da);
  });
}

}  // namespace rnnfast::cuda::streaming
