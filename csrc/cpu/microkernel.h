// The product of a few state rows with packed weights, accumulators held in registers.
//
// Packed weights are panels one vector wide: panel j holds, for each inner index k, the weights of
// outputs [j*lanes, (j+1)*lanes), zero-padded; before them the outputs' bias where a cell has one.
// Every output is a sum of parts of kPart products, each accumulated over k in order in one
// register: its bits depend neither on the tile it was computed in nor on the number of threads.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

constexpr int kMaxPanels = 8;

// One long sum of K products errs with K, a sum of parts with the square root of K * kPart. This
// long a part errs no more than torch's own product; half of it costs a float 3% of its speed.
template <class A>
constexpr int64_t kPart = sizeof(A) == 4 ? 32 : 16;

template <class A>
struct Packed {
  const A* data;
  int64_t inner;         // K: length of a state row
  int64_t panel_stride;  // elements from one panel to the next
  bool bias;             // the first row of a panel starts the sum
};

// tile[row * P + panel] = sum over k of x[row][k] * panel[k]. Unrolled over rows and panels in
// full: GCC 12 keeps an array of accumulators in memory otherwise, at a third of the speed.
template <class A, int M, int P>
[[gnu::noinline]] void multiply(const Packed<A>& w, int64_t first_panel, const A* x,
                                int64_t x_stride, Vec<A>* tile) {
  constexpr int L = kLanes<A>;
  const int64_t stride = w.panel_stride;
  const A* weights = w.data + first_panel * stride;
  Vec<A> sum[M][P];
#pragma GCC unroll 8
  for (int j = 0; j < P; ++j) {
    const Vec<A> start = w.bias ? load(weights + j * stride) : Vec<A>{};
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) sum[i][j] = start;
  }
  if (w.bias) weights += L;
  const int64_t inner = w.inner;
  for (int64_t begin = 0, end; begin < inner; begin = end) {
    end = inner - begin < kPart<A> ? inner : begin + kPart<A>;
    for (int64_t k = begin; k < end; ++k) {
      Vec<A> column[P];
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) column[j] = load(weights + j * stride + k * L);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const Vec<A> value = splat(x[i * x_stride + k]);
#pragma GCC unroll 8
        for (int j = 0; j < P; ++j) sum[i][j] += value * column[j];
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) {
        tile[i * P + j] = begin == 0 ? sum[i][j] : tile[i * P + j] + sum[i][j];
        sum[i][j] = Vec<A>{};
      }
    }
  }
}

template <class A>
using Multiply = void (*)(const Packed<A>&, int64_t, const A*, int64_t, Vec<A>*);

constexpr int max_panels(int64_t rows) {
  const int64_t fit = kAccumulators / rows;
  return fit < kMaxPanels ? static_cast<int>(fit) : kMaxPanels;
}

template <class A>
struct MultiplyTable {
  Multiply<A> at[kTileRows + 1][kMaxPanels + 1] = {};
};

template <class A, int M, int P>
constexpr void fill(MultiplyTable<A>& table) {
  table.at[M][P] = &multiply<A, M, P>;
  if constexpr (P < max_panels(M)) {
    fill<A, M, P + 1>(table);
  } else if constexpr (M < kTileRows) {
    fill<A, M + 1, 1>(table);
  }
}

template <class A>
constexpr MultiplyTable<A> make_multiply_table() {
  MultiplyTable<A> table;
  fill<A, 1, 1>(table);
  return table;
}

template <class A>
inline constexpr MultiplyTable<A> kMultiply = make_multiply_table<A>();

// Part i of `total` things dealt out evenly to `parts`.
RNNFAST_INLINE int64_t part_begin(int64_t total, int64_t parts, int64_t i) {
  const int64_t each = total / parts;
  const int64_t rest = total % parts;
  return i * each + (i < rest ? i : rest);
}

RNNFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows of one slice and the vectors of units are cut into tiles; kGates neighbouring
// panels serve one vector of units.
struct Tiling {
  int64_t rows;
  int64_t row_tiles;
  int64_t units;  // in vectors
  int64_t unit_groups;
};

RNNFAST_INLINE Tiling make_tiling(int64_t rows, int64_t units, int gates) {
  const int64_t most = kAccumulators / gates < kTileRows ? kAccumulators / gates : kTileRows;
  Tiling tiling = {rows, ceil_div(rows, most), units, 1};
  const int64_t tallest = ceil_div(rows, tiling.row_tiles);
  const int64_t wide = max_panels(tallest) / gates;
  tiling.unit_groups = ceil_div(units, wide > 1 ? wide : 1);
  return tiling;
}

// Calls epilogue(row, unit, u) once for each row and vector of units, u pointing at its kGates
// products. Panels outside, rows inside: the weights stream through the cache once a step.
// Where skip(first_row, end_row) holds, nobody needs the products and u is undefined.
template <class A, int kGates, class Skip, class Epilogue>
RNNFAST_INLINE void for_each_product(const Packed<A>& w, const A* x, int64_t x_stride,
                                     const Tiling& tiling, Skip&& skip, Epilogue&& epilogue) {
  Vec<A> tile[kAccumulators];
  for (int64_t group = 0; group < tiling.unit_groups; ++group) {
    const int64_t unit = part_begin(tiling.units, tiling.unit_groups, group);
    const int64_t unit_end = part_begin(tiling.units, tiling.unit_groups, group + 1);
    const int64_t panels = (unit_end - unit) * kGates;
    for (int64_t i = 0; i < tiling.row_tiles; ++i) {
      const int64_t row = part_begin(tiling.rows, tiling.row_tiles, i);
      const int64_t row_end = part_begin(tiling.rows, tiling.row_tiles, i + 1);
      if (!skip(row, row_end))
        kMultiply<A>.at[row_end - row][panels](w, unit * kGates, x + row * x_stride, x_stride,
                                               tile);
      const Vec<A>* u = tile;
      for (int64_t r = row; r < row_end; ++r)
        for (int64_t v = unit; v < unit_end; ++v, u += kGates) epilogue(r, v, u);
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
