// The product of a few state rows with packed weights, accumulators held in registers.
//
// Packed weights are panels one vector wide: panel j holds, for each inner index k, the weights of
// outputs [j*lanes, (j+1)*lanes), zero-padded; before them the outputs' bias where a cell has one.
// Every output is a sum of parts, each of so many products, accumulated over k in order in one
// register: its bits depend neither on the tile it was computed in nor on the number of threads.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

constexpr int kMaxPanels = 8;

// Length of a part. One long sum of K products errs with K, a sum of parts with the square root of
// K * (length + K / length), and that stays below the error of torch's own products. Each part
// costs a round trip of the accumulators through memory: at K = 512 parts of 32 take 9% of the
// speed.
template <class A>
RNNFAST_INLINE int64_t part_length(int64_t inner) {
  const int64_t length = inner <= 128 ? 32 : inner <= 256 ? 64 : 128;
#if defined(__FMA__) || defined(__aarch64__)
  return sizeof(A) == 4 ? length : length / 2;
#else
  return sizeof(A) == 4 ? length / 2 : length / 4;
#endif
}

template <class A>
struct Packed {
  const A* data;
  int64_t inner;         // K: length of a state row
  int64_t panel_stride;  // elements from one panel to the next
  bool bias;             // the first row of a panel starts the sum
};

// How the left operand lies in memory: rows of K values, or strips, the values of a tile's rows
// side by side for each k (a product over points has its operands so, and would have to transpose
// one).
enum class Left { kRows, kStrips };
template <class A>
constexpr int kStrip = (kTileRows + kLanes<A> - 1) / kLanes<A> * kLanes<A>;

// tile[row * P + panel] = sum over k of x[row][k] * panel[k]. Unrolled over rows and panels in
// full: GCC 12 keeps an array of accumulators in memory otherwise, at a third of the speed.
template <class A, Left kLeft, int M, int P>
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
  const int64_t part = part_length<A>(inner);
  for (int64_t begin = 0, end; begin < inner; begin = end) {
    end = inner - begin < part ? inner : begin + part;
    for (int64_t k = begin; k < end; ++k) {
      Vec<A> column[P];
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) column[j] = load(weights + j * stride + k * L);
#pragma GCC unroll 12
      for (int i = 0; i < M; ++i) {
        const Vec<A> value =
            splat(kLeft == Left::kRows ? x[i * x_stride + k] : x[k * kStrip<A> + i]);
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

template <class A, Left kLeft, int M, int P>
constexpr void fill(MultiplyTable<A>& table) {
  table.at[M][P] = &multiply<A, kLeft, M, P>;
  if constexpr (P < max_panels(M)) {
    fill<A, kLeft, M, P + 1>(table);
  } else if constexpr (M < kTileRows) {
    fill<A, kLeft, M + 1, 1>(table);
  }
}

template <class A, Left kLeft>
constexpr MultiplyTable<A> make_multiply_table() {
  MultiplyTable<A> table;
  fill<A, kLeft, 1, 1>(table);
  return table;
}

template <class A, Left kLeft>
inline constexpr MultiplyTable<A> kMultiply = make_multiply_table<A, kLeft>();

// Part i of `total` things dealt out evenly to `parts`.
RNNFAST_INLINE int64_t part_begin(int64_t total, int64_t parts, int64_t i) {
  const int64_t each = total / parts;
  const int64_t rest = total % parts;
  return i * each + (i < rest ? i : rest);
}

RNNFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `total` things cut into runs whose lengths differ by one at most, the longer ones first.
struct Cut {
  int64_t total = 0;
  int64_t runs = 0;
  int64_t each = 0;
  int64_t longer = 0;

  RNNFAST_INLINE static Cut of(int64_t total, int64_t runs) {
    return {total, runs, runs > 0 ? total / runs : 0, runs > 0 ? total % runs : 0};
  }
  RNNFAST_INLINE int64_t length(int64_t run) const { return each + (run < longer ? 1 : 0); }
};

// How the rows of one slice and the vectors of units are cut into tiles; kGates neighbouring
// panels serve one vector of units.
struct Tiling {
  Cut rows;
  int64_t first_unit;  // units count in vectors
  Cut units;
};

template <Left kLeft = Left::kRows>
RNNFAST_INLINE Tiling make_tiling(int64_t rows, int64_t first_unit, int64_t units, int gates) {
  constexpr int64_t kMost = kLeft == Left::kRows ? kRowsOfTile : kTileRows;
  const int64_t most = kAccumulators / gates < kMost ? kAccumulators / gates : kMost;
  if (rows == 0) return {{}, first_unit, {}};  // this thread has nothing to compute
  const Cut row_tiles = Cut::of(rows, ceil_div(rows, most));
  const int64_t wide = max_panels(row_tiles.length(0)) / gates;
  return {row_tiles, first_unit, Cut::of(units, ceil_div(units, wide > 1 ? wide : 1))};
}

// Calls epilogue(row, unit, end, u) for runs of units that cover each row once, u pointing at the
// kGates products of each unit. Panels outside, rows inside: the weights stream through the cache
// once a step. Where skip(first_row, end_row) holds, nobody needs the products and u is undefined.
// x_stride: elements from one row of x to the next, or from one strip to the next.
template <class A, int kGates, Left kLeft = Left::kRows, class Skip, class Epilogue>
RNNFAST_INLINE void for_each_product(const Packed<A>& w, const A* x, int64_t x_stride,
                                     const Tiling& tiling, Skip&& skip, Epilogue&& epilogue) {
  Vec<A> tile[kAccumulators];
  int64_t unit = tiling.first_unit;
  for (int64_t group = 0, unit_end; group < tiling.units.runs; ++group, unit = unit_end) {
    unit_end = unit + tiling.units.length(group);
    const int64_t panels = (unit_end - unit) * kGates;
    const A* left = x;
    for (int64_t i = 0, row = 0, row_end; i < tiling.rows.runs; ++i, row = row_end) {
      row_end = row + tiling.rows.length(i);
      if (!skip(row, row_end))
        kMultiply<A, kLeft>.at[row_end - row][panels](w, unit * kGates, left, x_stride, tile);
      for (int64_t r = row; r < row_end; ++r)
        epilogue(r, unit, unit_end, tile + (r - row) * panels);
      left += (kLeft == Left::kRows ? row_end - row : 1) * x_stride;
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
