// dW_hh = the sum over points (t, b) of du_t^T h_before, [gates * S, S] of each group: a product
// whose inner index runs over points.
#pragma once

#include "parallel.h"
#include "plan.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Points taken at a time: a strip and two panels of them fit the L1 cache.
constexpr int64_t kChunk = 256;

// Elements of a panel or strip: never a multiple of 4096 bytes, or all that are being packed would
// compete for one set of the L1 cache.
template <class A>
RNNFAST_INLINE constexpr int64_t with_gap(int64_t elements) {
  return elements + 64 / static_cast<int64_t>(sizeof(A));
}

template <class Cell, class S>
struct WeightGradient {
  using A = Arithmetic<S>;
  static constexpr int L = kLanes<A>;

  const BackwardProblem& problem;
  int threads;  // at most
  A* panels = nullptr;
  A* strips = nullptr;
  A* sums = nullptr;

  static void clear(const BackwardProblem& problem) {
    const Shape& shape = problem.shape;
    S* const dw = static_cast<S*>(problem.dw_hh);
    const int64_t all = shape.directions * shape.heads * Cell::kGates * shape.size * shape.size;
    for (int64_t i = 0; dw != nullptr && i < all; ++i) dw[i] = S{};
  }

  int64_t rows() const { return Cell::kGates * problem.shape.size; }
  int64_t units() const { return ceil_div(problem.shape.size, L); }
  int64_t panel_elements() const { return whole_blocks<A>(units() * with_gap<A>(L * kChunk)); }
  // A member has at most one tile more than it would have of all tiles together.
  int64_t strip_elements() const {
    return (ceil_div(rows(), kTileRows) + 2 * threads) *
           whole_blocks<A>(with_gap<A>(kChunk * kStrip<A>));
  }
  int64_t sum_elements() const {
    return kNarrow ? whole_blocks<A>(rows() * problem.shape.size) : 0;
  }
  int64_t elements() const {
    if (problem.dw_hh == nullptr) return 0;
    return panel_elements() + strip_elements() + sum_elements();
  }
  void place(const Scratch& memory) {
    panels = reinterpret_cast<A*>(memory.data());
    strips = panels + panel_elements();
    sums = strips + strip_elements();
  }

  // Every member of the team calls it.
  void run(const Member& member) const {
    const Shape& shape = problem.shape;
    for (int64_t group = 0; group < shape.directions * shape.heads; ++group) {
      S* const dw = static_cast<S*>(problem.dw_hh) + group * rows() * shape.size;
      Product product = {*this, group, member, {}, {}, 0, 0, 0, 0, nullptr};
      if constexpr (kNarrow) {
        product.sum = sums;
      } else {
        product.sum = dw;
      }
      product.run();
      if constexpr (kNarrow) product.write(dw);
    }
  }

 private:
  // Sums are kept in the arithmetic type and rounded once.
  static constexpr bool kNarrow = sizeof(S) != sizeof(A);

  // One group's product, seen from one thread, which computes some of the rows.
  struct Product {
    const WeightGradient& shared;
    int64_t group;
    const Member& member;
    const S* du[kChunk];      // rows of the points of this chunk
    const S* before[kChunk];  // likewise
    int64_t points;
    int64_t t, b;  // of the next point
    int64_t first_row;
    A* sum;  // [rows, S]

    void run() {
      first_row = part_begin(shared.rows(), member.count, member.index);
      const int64_t count = part_begin(shared.rows(), member.count, member.index + 1) - first_row;
      const int64_t size = shared.problem.shape.size;
      for (int64_t i = first_row * size; i < (first_row + count) * size; ++i) sum[i] = 0;
      const Tiling tiling = make_tiling(count, 0, shared.units(), 1);
      while (gather()) {
        pack_panels();
        if (count > 0) pack_strips(tiling);
        if (member.count > 1) member.barriers[0].wait(member.count);
        if (count > 0) multiply(tiling);
        if (member.count > 1) member.barriers[0].wait(member.count);  // before panels change
      }
    }

    void write(S* dw) {
      const int64_t size = shared.problem.shape.size;
      const int64_t end = part_begin(shared.rows(), member.count, member.index + 1);
      for (int64_t row = first_row; row < end; ++row)
        for (int64_t unit = 0; unit < size; unit += L)
          store(dw + row * size + unit, narrow<S>(load(sum + row * size + unit, size - unit)),
                size - unit);
    }

   private:
    // The next points that count: within the row's length, and whose step saw a state that was not
    // simply zero. False when there are none left.
    bool gather() {
      const BackwardProblem& problem = shared.problem;
      const Shape& shape = problem.shape;
      const Sequence<void*>& du_of = Cell::kSplitGradient ? problem.du : problem.dp;
      const bool reverse = group >= shape.heads;
      points = 0;
      for (; t < shape.steps; ++t, b = 0) {
        for (; b < shape.batch; ++b) {
          if (points == kChunk) return true;
          const int64_t length = problem.lengths != nullptr ? problem.lengths[b] : shape.steps;
          if (t >= length) continue;
          if (t == (reverse ? length - 1 : 0)) {
            if (problem.h0 == nullptr) continue;
            before[points] = static_cast<const S*>(problem.h0) + state_offset(shape, group, b);
          } else {
            before[points] = static_cast<const S*>(problem.y.data) +
                             (reverse ? t + 1 : t - 1) * problem.y.stride_t +
                             b * problem.y.stride_b + group * shape.size;
          }
          du[points++] = static_cast<const S*>(du_of.data) + t * du_of.stride_t +
                         b * du_of.stride_b + group * shared.rows();
        }
      }
      return points > 0;
    }

    // Both copies go along the rows of the points, which come from far away.
    void pack_panels() const {
      const int64_t size = shared.problem.shape.size;
      const int64_t first = part_begin(shared.units(), member.count, member.index);
      const int64_t end = part_begin(shared.units(), member.count, member.index + 1);
      const int64_t whole = size / L < end ? size / L : end;
      const int64_t stride = with_gap<A>(points * L);
      A* to = shared.panels + first * stride;
      const int64_t count = points;
      for (int64_t k = 0; k < count; ++k, to += L) {
        const S* const from = before[k];
        A* panel = to;
        int64_t unit = first;
        for (; unit < whole; ++unit, panel += stride) store_raw(panel, load(from + unit * L));
        if (unit < end) store_raw(panel, load(from + unit * L, size - unit * L));
      }
    }

    void pack_strips(const Tiling& tiling) const {
      const Cut rows = tiling.rows;
      const int64_t rest = shared.rows() - first_row;
      const int64_t stride = with_gap<A>(points * kStrip<A>);
      A* to = own_strips();
      const int64_t count = points;
      for (int64_t k = 0; k < count; ++k, to += kStrip<A>) {
        const S* const from = du[k] + first_row;
        A* strip = to;
        for (int64_t i = 0, row = 0; i < rows.runs; row += rows.length(i), ++i, strip += stride) {
          if (row + kStrip<A> <= rest) {
            for (int r = 0; r < kStrip<A>; r += L) store_raw(strip + r, load(from + row + r));
          } else {
            for (int r = 0; r < kStrip<A> && row + r < rest; r += L)
              store_raw(strip + r, load(from + row + r, rest - row - r));
          }
        }
      }
    }

    A* own_strips() const {
      const int64_t tiles_before = first_row / kTileRows + 2 * member.index;
      return shared.strips + tiles_before * whole_blocks<A>(with_gap<A>(kChunk * kStrip<A>));
    }

    void multiply(const Tiling& tiling) const {
      const int64_t size = shared.problem.shape.size;
      const Packed<A> packed = {shared.panels, points, with_gap<A>(points * L), false};
      for_each_product<A, 1, Left::kStrips>(
          packed, own_strips(), with_gap<A>(points * kStrip<A>), tiling,
          [](int64_t, int64_t) { return false; },
          [&](int64_t row, int64_t vector, int64_t end, const Vec<A>* product)
              RNNFAST_INLINE_LAMBDA {
                for (; vector < end; ++vector, ++product) {
                  A* const to = sum + (first_row + row) * size + vector * L;
                  const int64_t rest = size - vector * L;
                  store(to, load(to, rest) + product[0], rest);
                }
              });
    }
  };
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
