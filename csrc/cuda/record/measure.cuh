// The record of a backward pass, from its results: dh_t = c_t + g_t, da_t, h_t. In the time loop
// these sums would take longer than the step (bench/ladder/cuda_kernel.md): so the loop stores c_t,
// and here all multiprocessors take the sums at once.
//
// A warp takes one row of the batch of one step at a time, all heads of a direction, its lanes side
// by side; sums are Blue's in a lane and float64 over the lanes, heads and rows, always
// in the same order.
#pragma once

#include "cuda/device/math.cuh"
#include "cuda/device/place.cuh"
#include "cuda/device/rt.cuh"
#include "cuda/problem.h"

namespace rnnfast::cuda {

constexpr int kMeasureWarps = 8;

// The sum of squares of a lane's values: Blue's three scaled sums (ACM TOMS 4, 1978), for values
// below 2^-40, for usual ones, and for values from 2^50 on. Subnormal values count.
struct LaneSquares {
  static constexpr float kSmallScale = 0x1p100f;
  static constexpr float kLargeScale = 0x1p-80f;
  static constexpr float kLeastSum = 0x1p-80f;  // that is right as it is
  static constexpr float kMostSum = 0x1p100f;

  float small = 0.0f, usual = 0.0f, large = 0.0f;

  RT_DEVICE void add(float x) {
    const float up = x * kSmallScale, down = x * kLargeScale;
    small += up * up;
    usual += x * x;
    large += down * down;
  }

  RT_DEVICE double sum() const {
    // inf takes the last branch, a NaN stays a NaN.
    double scale = 1, squares = usual;
    if (usual < kLeastSum) scale = kSmallScale, squares = small;
    if (usual > kMostSum) scale = kLargeScale, squares = large;
    return squares / (scale * scale);
  }
};

RT_DEVICE double over_warp(double value) {
  RT_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) value += rt::shuffle_xor(value, lanes);
  return value;
}

// One row of the record of one step. most: bits of the largest |dh|; bits are ordered as magnitudes
// are, with NaN as the largest.
struct Row {
  double fields[kFields] = {};
  std::uint32_t most = 0;

  RT_DEVICE void add(const Row& other) {
    RT_UNROLL for (int i = 0; i < kFields; ++i) fields[i] += other.fields[i];
    most = other.most > most ? other.most : most;
  }

  RT_DEVICE void put(double* to) const {
    RT_UNROLL for (int i = 0; i < kFields; ++i) {
      to[i] = i == kStateMax ? rt::float_of(most) : fields[i];
    }
  }
};

template <class Stored>
RT_DEVICE float widened(const Stored* address) {
  return rt::widen(rt::load(address));
}

template <class Stored>
RT_DEVICE Row row_of(const Measured& a, int t, int d, int b, int lane) {
  const Shape& s = a.shape;
  const int length = a.lengths == nullptr ? s.steps : static_cast<int>(rt::load(a.lengths + b));
  Row row;
  if (t >= length) return row;
  const bool last = t == (d ? 0 : length - 1);
  const int edge = t + 1 - d, width = s.heads * s.size;
  const auto at = [&](const Sequence<const void*>& from) {
    const Stored* base = static_cast<const Stored*>(from.data);
    return base == nullptr ? nullptr : base + t * from.stride_t + b * from.stride_b;
  };
  const Stored *grad_y = at(a.grad_y), *y = at(a.y), *dp = at(a.dp);
  const Stored* grad_h_n = nullptr;
  if (last && a.grad_h_n != nullptr) {
    grad_h_n = static_cast<const Stored*>(a.grad_h_n) + (std::int64_t{d} * s.batch + b) * width;
  }
  const float* carry = a.carry + (std::int64_t{t} * s.batch + b) * s.groups * s.size;
  LaneSquares came, preact;
  double state = 0, clipped = 0;
  float slopes = 0.0f;
  int bad_gradients = 0, bad_states = 0;
  for (int head = 0; head < s.heads; ++head) {
    LaneSquares of_head;
    for (int unit = head * s.size + lane; unit < (head + 1) * s.size; unit += 32) {
      const int column = d * width + unit;
      const float c = rt::load(carry + column), da = widened(dp + column);
      const float h = widened(y + column);
      float dh = c, slope = 0.0f;
      if (grad_y != nullptr) dh += widened(grad_y + column);
      if (grad_h_n != nullptr) dh += widened(grad_h_n + unit);
      cells::with_nonlinearity(a.nonlinearity, [&](auto function) {
        slope = decltype(function)::template backward<Math>(1.0f, h);
      });
      of_head.add(dh);
      came.add(c);
      preact.add(da);
      slopes += rt::magnitude(slope);
      bad_gradients += rt::is_finite(dh) && rt::is_finite(da) ? 0 : 1;
      bad_states += rt::is_finite(h) ? 0 : 1;
      const std::uint32_t bits = rt::bits_of(dh) & 0x7fffffff;
      row.most = bits > row.most ? bits : row.most;
    }
    const double squares = over_warp(of_head.sum());
    state += squares;
    // The time loop has clipped likewise, up to the rounding of its float32.
    const double limit = a.clip;
    const bool clips = limit > 0 && squares > limit * limit && squares < __builtin_inf();
    clipped += clips ? limit * limit : squares;
  }
  row.fields[kStateSquares] = state;
  row.fields[kCarrySquares] = over_warp(came.sum());
  row.fields[kClippedSquares] = clipped;
  row.fields[kPreactSquares] = over_warp(preact.sum());
  row.fields[kSlopes] = over_warp(slopes);
  row.fields[kNonfiniteGrad] = over_warp(bad_gradients);
  row.fields[kNonfiniteState] = over_warp(bad_states);
  row.fields[kEntries] = width;
  const bool cut = a.reset != nullptr && edge < length &&
                   rt::load(a.reset + std::int64_t{edge} * s.batch + b) != 0;
  row.fields[kCarried] = last || cut || at_window(a.window, edge, length) ? 0 : width;
  RT_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) {
    const std::uint32_t other = rt::shuffle_xor(row.most, lanes);
    row.most = other > row.most ? other : row.most;
  }
  return row;
}

// Block x is step x of direction y.
template <class Stored>
RT_KERNEL(32 * kMeasureWarps)
measure_kernel(Measured a) {
  const int lane = rt::thread() % 32, warp = rt::thread() / 32;
  const int t = rt::block_x(), d = rt::block_y();
  double* step = a.record + (std::int64_t{d} * a.shape.steps + t) *
                                (a.per_sample ? a.shape.batch : 1) * kFields;
  Row sum;
  for (int b = warp; b < a.shape.batch; b += kMeasureWarps) {
    const Row row = row_of<Stored>(a, t, d, b, lane);
    if (a.per_sample) {
      if (lane == 0) row.put(step + std::int64_t{b} * kFields);
    } else {
      sum.add(row);
    }
  }
  if (a.per_sample) return;
  auto* rows = reinterpret_cast<Row*>(rt::shared());
  if (lane == 0) rows[warp] = sum;
  rt::sync_block();
  if (rt::thread() != 0) return;
  for (int w = 1; w < kMeasureWarps; ++w) sum.add(rows[w]);
  sum.put(step);
}

}  // namespace rnnfast::cuda
