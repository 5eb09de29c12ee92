// The product of a few state rows with packed weights, accumulators held in registers.
//
// Packed weights are panels one vector wide: panel j holds, for each inner index k, the weights of
// outputs [j*lanes, (j+1)*lanes), zero-padded; before them the outputs' bias where a cell has one.
// Every output is a sum of parts, each of so many products, accumulated over k in order in one
// register or two: its bits depend neither on the tile it was computed in nor on the number of
// threads.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

constexpr int kMaxPanels = 8;

// How the sum of K products is taken. Within a part `chains` accumulators take every other k each.
//
// One long sum errs with K, a sum of parts with the square root of
// K * (part / chains + K / part). Each part costs a round trip of the accumulators through memory:
// at K = 512 parts of 32 take 9% of the speed. A second chain costs registers.
struct Sums {
  int64_t part;
  int chains;
};

template <class A>
RNNFAST_INLINE int64_t part_for(int64_t length) {
#if defined(__FMA__) || defined(__aarch64__)
  return sizeof(A) == 4 ? length : length / 2;
#else
  return sizeof(A) == 4 ? length / 2 : length / 4;
#endif
}

// Below the error of torch's products of many rows, which are long sums themselves.
template <class A>
RNNFAST_INLINE Sums usual_sums(int64_t inner) {
  return {part_for<A>(inner <= 128 ? 32 : inner <= 256 ? 64 : 128), 1};
}

// Few rows times a transposed matrix are dot products to MKL, 8 or 16 sums side by side, which err
// less than half as much as the usual sums: up to 12 rows with AVX-512, a single one with AVX2. The
// order is the same for all rows of a batch, whichever thread has them.
template <class A>
RNNFAST_INLINE Sums sums_for_batch(int64_t inner, int64_t batch) {
  constexpr bool kAvx512 = kVectorBytes == 64;
  if (batch <= (kAvx512 ? 4 : 1))
    return {part_for<A>(inner <= 192 ? 24 : inner <= 256 ? 32 : 64), 2};
  if (kAvx512 && batch <= 12) return {part_for<A>(inner <= 256 ? 24 : inner <= 512 ? 32 : 64), 1};
  if (batch <= 4 && inner <= 48) return {part_for<A>(24), 1};
  return usual_sums<A>(inner);
}

template <class A>
struct Packed {
  const A* data;
  int64_t inner;         // K: length of a state row
  int64_t panel_stride;  // elements from one panel to the next
  bool bias;             // the first row of a panel is added to the sum
  Sums sums;
};

// How the left operand lies in memory: rows of K values, or strips, the values of a tile's rows
// side by side for each k (a product over points has its operands so, and would have to transpose
// one).
enum class Left { kRows, kStrips };
// A multiple of half a vector: packing stores whole vectors, and the next k's values overwrite the
// other half.
template <class A>
constexpr int kStrip = (2 * kTileRows + kLanes<A> - 1) / kLanes<A> * kLanes<A> / 2;

// tile[row * P + panel] = sum over k of x[row][k] * panel[k]. Unrolled over rows and panels in
// full: GCC 12 keeps an array of accumulators in memory otherwise, at a third of the speed.
template <class A, Left kLeft, int kChains, int M, int P>
[[gnu::noinline]] void multiply(const Packed<A>& w, int64_t first_panel, const A* x,
                                int64_t x_stride, Vec<A>* tile) {
  constexpr int L = kLanes<A>;
  const int64_t stride = w.panel_stride;
  const A* weights = w.data + first_panel * stride;
  Vec<A> sum[kChains][M][P] = {};
  // Added last: in a sum that begins with a large bias every product would be rounded to its
  // digits.
  const A* bias = w.bias ? weights : nullptr;
  if (w.bias) weights += L;
  const int64_t inner = w.inner;
  const int64_t part = w.sums.part;
  const auto add = [&](int64_t k, Vec<A>(&to)[M][P]) RNNFAST_INLINE_LAMBDA {
    Vec<A> column[P];
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) column[j] = load(weights + j * stride + k * L);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Vec<A> value = splat(kLeft == Left::kRows ? x[i * x_stride + k] : x[k * kStrip<A> + i]);
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) to[i][j] += value * column[j];
    }
  };
  for (int64_t begin = 0, end; begin < inner; begin = end) {
    end = inner - begin < part ? inner : begin + part;
    int64_t k = begin;
    for (; k + kChains <= end; k += kChains) {
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain) add(k + chain, sum[chain]);
    }
    if (kChains > 1 && k < end) add(k, sum[0]);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j) {
        Vec<A> total = sum[0][i][j];
        if constexpr (kChains > 1) total += sum[1][i][j];
        tile[i * P + j] = begin == 0 ? total : tile[i * P + j] + total;
#pragma GCC unroll 2
        for (int chain = 0; chain < kChains; ++chain) sum[chain][i][j] = Vec<A>{};
      }
    }
  }
  if (bias == nullptr) return;
#pragma GCC unroll 8
  for (int j = 0; j < P; ++j) {
    const Vec<A> value = load(bias + j * stride);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) tile[i * P + j] += value;
  }
}

template <class A>
using Multiply = void (*)(const Packed<A>&, int64_t, const A*, int64_t, Vec<A>*);

// Rows of a tile at most, and panels of a tile of so many rows.
constexpr int max_rows(int chains) { return chains == 1 ? kTileRows : kAccumulators / 4; }
constexpr int max_panels(int64_t rows, int chains) {
  const int64_t fit = kAccumulators / (rows * chains);
  return fit < kMaxPanels ? static_cast<int>(fit) : kMaxPanels;
}

template <class A>
struct MultiplyTable {
  Multiply<A> at[kTileRows + 1][kMaxPanels + 1] = {};
};

template <class A, Left kLeft, int kChains, int M, int P>
constexpr void fill(MultiplyTable<A>& table) {
  table.at[M][P] = &multiply<A, kLeft, kChains, M, P>;
  if constexpr (P < max_panels(M, kChains)) {
    fill<A, kLeft, kChains, M, P + 1>(table);
  } else if constexpr (M < max_rows(kChains)) {
    fill<A, kLeft, kChains, M + 1, 1>(table);
  }
}

template <class A, Left kLeft, int kChains>
constexpr MultiplyTable<A> make_multiply_table() {
  MultiplyTable<A> table;
  fill<A, kLeft, kChains, 1, 1>(table);
  return table;
}

template <class A, Left kLeft, int kChains>
inline constexpr MultiplyTable<A> kMultiply = make_multiply_table<A, kLeft, kChains>();

template <class A, Left kLeft>
RNNFAST_INLINE const MultiplyTable<A>& multiply_table(int chains) {
  if constexpr (kLeft == Left::kRows) {
    if (chains == 2) return kMultiply<A, kLeft, 2>;
  }
  return kMultiply<A, kLeft, 1>;
}

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
  // The runs [first, first + most), as far as there are so many.
  RNNFAST_INLINE Cut part(int64_t first, int64_t most) const {
    const int64_t count = runs - first < most ? runs - first : most;
    const int64_t long_ones = longer < first ? 0 : longer - first < count ? longer - first : count;
    return {count * each + long_ones, count, each, long_ones};
  }
};

// How the rows of one slice and the vectors of units are cut into tiles; kGates neighbouring
// panels belong to one vector of units.
struct Tiling {
  Cut rows;
  int64_t first_unit;  // units count in vectors
  Cut units;
};

template <Left kLeft = Left::kRows>
RNNFAST_INLINE Tiling make_tiling(int64_t rows, int64_t first_unit, int64_t units, int gates,
                                  int chains = 1) {
  const int64_t fit = kAccumulators / (gates * chains);
  const int64_t usual = kLeft == Left::kRows ? kRowsOfTile : kTileRows;
  const int64_t allowed = chains == 1 ? usual : max_rows(chains);
  const int64_t most = fit < allowed ? fit : allowed;
  if (rows == 0) return {{}, first_unit, {}};  // this thread has nothing to compute
  const Cut row_tiles = Cut::of(rows, ceil_div(rows, most));
  const int64_t wide = max_panels(row_tiles.length(0), chains) / gates;
  return {row_tiles, first_unit, Cut::of(units, ceil_div(units, wide > 1 ? wide : 1))};
}

// A tile of products: rows [row, row_end), units [first, end), each with `gates` neighbouring
// vectors.
template <class A>
struct Tile {
  int64_t row, row_end;
  int64_t first, end;
  Vec<A>* products;
  int64_t row_stride;  // vectors

  RNNFAST_INLINE Tile rows(int64_t from, int64_t to) const {
    return {from, to, first, end, products + (from - row) * row_stride, row_stride};
  }
};

// Calls epilogue(tile) for tiles that cover each row and unit once. Panels outside, rows inside:
// the weights stream through the cache once a step. Where skip(first_row, end_row) holds, nobody
// needs the products, and they are undefined. x_stride: elements from one row of x to the next, or
// from one strip to the next.
template <class A, Left kLeft = Left::kRows, class Skip, class Epilogue>
RNNFAST_INLINE void for_each_product(const Packed<A>& w, const A* x, int64_t x_stride, int gates,
                                     const Tiling& tiling, Skip&& skip, Epilogue&& epilogue) {
  const MultiplyTable<A>& multiply = multiply_table<A, kLeft>(w.sums.chains);
  constexpr int kGathered = kAccumulators > 32 ? kAccumulators : 32;
  Vec<A> products[kGathered];
  int64_t unit = tiling.first_unit;
  if (tiling.rows.total == 1) {  // several tiles for one call of the epilogue
    const bool skipped = skip(int64_t{0}, int64_t{1});
    int64_t first = unit, panels = 0;
    for (int64_t group = 0; group < tiling.units.runs; ++group) {
      const int64_t more = tiling.units.length(group) * gates;
      if (panels + more > kGathered) {
        epilogue(Tile<A>{0, 1, first, unit, products, panels});
        first = unit;
        panels = 0;
      }
      if (!skipped) multiply.at[1][more](w, unit * gates, x, x_stride, products + panels);
      panels += more;
      unit += tiling.units.length(group);
    }
    if (panels > 0) epilogue(Tile<A>{0, 1, first, unit, products, panels});
    return;
  }
  for (int64_t group = 0, unit_end; group < tiling.units.runs; ++group, unit = unit_end) {
    unit_end = unit + tiling.units.length(group);
    const int64_t panels = (unit_end - unit) * gates;
    const A* left = x;
    for (int64_t i = 0, row = 0, row_end; i < tiling.rows.runs; ++i, row = row_end) {
      row_end = row + tiling.rows.length(i);
      if (!skip(row, row_end))
        multiply.at[row_end - row][panels](w, unit * gates, left, x_stride, products);
      epilogue(Tile<A>{row, row_end, unit, unit_end, products, panels});
      left += (kLeft == Left::kRows ? row_end - row : 1) * x_stride;
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
