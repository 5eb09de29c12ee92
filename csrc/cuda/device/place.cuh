// The units and the rows of the batch that belong to a thread, and its words of the tensors in
// memory. K is a kernel: Kernel of resident/kernel.cuh, or Tile of streaming/product.cuh.
#pragma once

#include "cuda/device/fragments.cuh"
#include "cuda/device/rt.cuh"
#include "cuda/problem.h"

namespace rnnfast::cuda {

// The units and the rows of the batch that belong to a thread.
template <class K>
struct Place {
  using W = Words<typename K::Stored>;
  static constexpr int kColumnsOfLane = W::kColumnsOfLane;

  int lane, warp, group, direction;
  int band, part;  // which tiles of the block the warp multiplies, and with which part of the state
  int size;        // S
  bool paired;
  int block_unit;  // the first of the block
  int band_unit;   // the first of the band
  int first_unit;  // the first that the warp owns
  int entry;       // where its sums are, among those of all owners
  int unit;        // of value 0 of tile 0; value v of tile m is units_on(v) further
  int word_unit;   // of word 0 of tile 0
  int slice;       // of the batch: the rows of this block, or cluster
  int row;         // the row of the batch in column 0
  int rows;        // how many columns are rows of the batch

  RT_DEVICE explicit Place(const Shape& shape) {
    stand(shape);
    band = warp % K::kBands;
    part = warp / K::kBands;
    const int rank = K::kBlocks > 1 ? rt::cluster_rank() : 0;
    block_unit = rank * K::kBlockUnits;
    band_unit = block_unit + band * K::kTiles * kTileUnits;
    slice = rt::block_x() / K::kBlocks;
    take(shape, band_unit + part * K::kOwnUnits, slice * shape.columns, shape.columns);
    entry = first_unit / K::kOwnUnits;
  }

  // The place of a warp that has one tile of slice `slice_`.
  RT_DEVICE Place(const Shape& shape, int tile, int slice_) {
    stand(shape);
    band = part = block_unit = 0;
    slice = slice_;
    take(shape, tile * kTileUnits, slice * kColumns, kColumns);
    band_unit = first_unit;
    entry = tile;
  }

  // Whether the warp has tiles of its own. The other warps only multiply.
  RT_DEVICE bool owner() const { return K::kAllOwn || warp < K::kOwners; }

  RT_DEVICE bool inside(int tile, int v) const { return padded_unit(tile, v) < size; }

  // Column e, 0 or 1, of the lane's values.
  RT_DEVICE int column(int e) const { return lane % 4 * 2 + e; }

  // The unit of a value, in the padded group or in the block.
  RT_DEVICE int padded_unit(int tile, int v) const { return unit + tile * kTileUnits + v / 2 * 8; }
  RT_DEVICE int unit_of_block(int tile, int v) const { return padded_unit(tile, v) - block_unit; }

  // How many units of a word are inside the group.
  RT_DEVICE int units_of(int tile, int word) const {
    return size - word_unit - tile * kTileUnits - W::units_on(word);
  }

 private:
  RT_DEVICE void stand(const Shape& shape) {
    lane = rt::thread() % 32;
    warp = rt::thread() / 32;
    group = rt::block_y();
    direction = group / shape.heads;
    size = shape.size;
    paired = shape.paired;
  }

  RT_DEVICE void take(const Shape& shape, int first_unit_, int first_row, int most_rows) {
    first_unit = first_unit_;
    unit = first_unit + lane / 4;
    word_unit = first_unit + W::unit(lane);
    row = first_row;
    rows = shape.batch - row < most_rows ? shape.batch - row : most_rows;
  }
};

// A thread's words of a sequence [T, B, N], one step after another.
template <class K, class Pointer>
struct Track {
  using W = typename Place<K>::W;
  Pointer* base;        // null: absent
  std::int64_t offset;  // of the lane's first column, its first unit, at a step
  std::int64_t stride_t, stride_b;

  template <class Sequence>
  RT_DEVICE Track(const Sequence& sequence, const Place<K>& place, int t)
      : base(static_cast<Pointer*>(sequence.data)),
        stride_t(sequence.stride_t),
        stride_b(sequence.stride_b) {
    offset = t * stride_t + (place.row + W::column(place.lane, 0)) * stride_b +
             std::int64_t{place.group} * place.size + place.word_unit;
  }

  // To the next step in time, or to the one before.
  RT_DEVICE void go(bool back) { offset += back ? -stride_t : stride_t; }

  // offset is in the column of word 0 already: W::column(0, word) is how many columns further.
  RT_DEVICE Pointer* at(int tile, int word) const {
    return base + (offset + W::column(0, word) * stride_b + tile * kTileUnits + W::units_on(word));
  }
};

template <class K>
using TileWords = std::uint32_t[K::kOwned][Words<typename K::Stored>::kCount];

// The words of a step, or zeros if there is no such step; zeros outside the group and the batch.
template <class K>
RT_DEVICE void fetch(const Track<K, const typename K::Stored>& track, bool there,
                     const Place<K>& place, TileWords<K>& words) {
  using W = Words<typename K::Stored>;
  there = there && track.base != nullptr;
  W::paired_or_not(place.paired, [&](auto paired) {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        const bool inside = there && W::column(place.lane, j) < place.rows;
        const int units = inside ? place.units_of(m, j) : 0;
        words[m][j] = W::template load<paired>(track.at(m, j), units);
      }
    }
  });
}

// Stores the words of a step. columns: a bit for each of the lane's columns that is stored.
template <class K>
RT_DEVICE void put(const Track<K, typename K::Stored>& track, const Place<K>& place,
                   const TileWords<K>& words, unsigned columns = ~0u) {
  using W = Words<typename K::Stored>;
  W::paired_or_not(place.paired, [&](auto paired) {
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      RT_UNROLL for (int j = 0; j < W::kCount; ++j) {
        const bool inside =
            W::column(place.lane, j) < place.rows && (columns >> j % W::kColumnsOfLane & 1) != 0;
        const int units = inside ? place.units_of(m, j) : 0;
        W::template store<paired>(track.at(m, j), words[m][j], units);
      }
    }
  });
}

// A state [D, B, heads * S] as a track of one step.
template <class K, class Pointer>
RT_DEVICE Track<K, Pointer> state_track(Pointer* base, const Shape& shape, Place<K> place) {
  place.row = rt::opaque(place.row);
  if (K::kScarce) place.direction = place.group < shape.heads ? 0 : 1;  // no division, no register
  const std::int64_t width = std::int64_t{shape.heads} * shape.size;
  // A direction takes the place of a time step. The stride takes back what the offset of a group
  // adds for the directions before.
  return {Sequence<Pointer*>{base, (shape.batch - 1) * width, width}, place, place.direction};
}

// Copies a parameter [G * S] of the block's units into shared memory, with zeros as padding. All
// threads write it; they read it behind the barrier that begins the exchange. Registers are for W.
template <class K>
RT_DEVICE void stage(const float* base, const Place<K>& place, float* shared) {
  for (int i = rt::thread(); i < K::kBlockUnits; i += K::kThreads) {
    const int unit = place.block_unit + i;
    const bool there = base != nullptr && unit < place.size;
    shared[i] = there ? base[std::int64_t{place.group} * place.size + unit] : 0.0f;
  }
}

// How many steps a row of the batch has; 0 for a column that is no row.
template <class K>
RT_DEVICE int length_of(const std::int64_t* lengths, const Shape& shape, const Place<K>& place,
                        int column) {
  if (column >= place.rows) return 0;
  if (lengths == nullptr) return shape.steps;
  return static_cast<int>(rt::load(lengths + place.row + column));
}

// Whether a reset lies at edge e of a row, between its steps e - 1 and e.
template <class K>
RT_DEVICE bool cut_at(const std::uint8_t* reset, const Shape& shape, const Place<K>& place, int e,
                      int column, int length) {
  if (reset == nullptr || e < 0 || e >= length) return false;
  return rt::load(reset + std::int64_t{e} * shape.batch + place.row + column) != 0;
}

// Whether an edge of the window for gradients is at e.
RT_DEVICE bool at_window(int window, int e, int length) {
  return window > 0 && e > 0 && e < length && e % window == 0;
}

}  // namespace rnnfast::cuda
