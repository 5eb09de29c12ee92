// The product of a time step: W_hh, or its transpose, times the state in shared memory.
#pragma once

#include "cuda/device/place.cuh"
#include "cuda/device/rt.cuh"
#include "cuda/resident/kernel.cuh"

namespace rnnfast::cuda {

template <class K>
using Weights = std::uint32_t[K::kRegisterProducts][K::Mode::kWeights];

// Address of this warp's weights for one product, for those kept in shared memory.
template <class K>
RT_DEVICE std::uint32_t* shared_weights(const Place<K>& place, int product) {
  const int index = place.warp * K::kSharedProducts + product - K::kRegisterProducts;
  return K::template at<std::uint32_t>(K::kSharedWeights) + index * 32 * K::Mode::kWeights;
}

// Loads the rows of W_hh (or of its transpose) that the warp multiplies, with zeros as padding.
template <class K, bool kTransposed>
RT_DEVICE void load_weights(const void* w_hh, const Place<K>& place, Weights<K>& weights) {
  using Mode = typename K::Mode;
  using Stored = typename K::Stored;
  constexpr int kTileSteps = kTileUnits / Mode::kDepth;
  const std::int64_t size = place.size;
  const Stored* w = static_cast<const Stored*>(w_hh) + place.group * size * size;
  const auto load = [&](int s, int m, std::uint32_t* a) {
    const int step = place.part * K::kSteps + s;
    int row = place.band_unit + m * kTileUnits, column = step / kTileSteps * kTileUnits;
    if (kTransposed) {
      const int swapped = row;
      row = column, column = swapped;
    }
    Mode::template weights<kTransposed>(a, w + row * size + column, size, place.size - row,
                                        place.size - column, place.lane, place.paired, step);
  };
  RT_UNROLL for (int n = 0; n < K::kRegisterProducts; ++n) {
    load(n / K::kTiles, n % K::kTiles, weights[n]);
    // Orders no data: without it the compiler issues all loads at once and runs out of registers.
    if (n % (2 * K::kTiles) == 2 * K::kTiles - 1) rt::sync_block();
  }
  // Each lane writes and later reads its own words: nothing to order.
  for (int n = K::kRegisterProducts; n < K::kRegisterProducts + K::kSharedProducts; ++n) {
    std::uint32_t a[K::Mode::kWeights];
    load(n / K::kTiles, n % K::kTiles, a);
    RT_UNROLL for (int i = 0; i < K::Mode::kWeights; i += 4) {
      const std::uint32_t four[4] = {a[i], a[i + 1], a[i + 2], a[i + 3]};
      rt::store(shared_weights<K>(place, n) + i * 32 + place.lane * 4, four);
    }
  }
}

template <class K>
using Products = float[K::kTiles][K::kChains][K::Mode::kSums][4];

// Begins the product of the warp's tiles with the state in shared memory: code between this and
// finish_product runs while the tensor cores compute. The sums begin with `values`; where the state
// has parts, finish_product adds the values instead.
template <class K>
RT_DEVICE void begin_product(const Weights<K>& weights, const std::uint32_t* state,
                             const Place<K>& place, const Values<K>& values, Products<K>& sums) {
  using Mode = typename K::Mode;
  RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
    RT_UNROLL for (int c = 0; c < K::kChains; ++c) {
      RT_UNROLL for (int i = 0; i < Mode::kSums; ++i) {
        RT_UNROLL for (int v = 0; v < 4; ++v) {
          sums[m][c][i][v] = 0.0f;
          if constexpr (K::kParts == 1) sums[m][c][i][v] = c + i == 0 ? values[m][v] : 0.0f;
        }
      }
    }
  }
  RT_UNROLL for (int i = 0; i < K::kSteps; ++i) {
    // Weights in shared memory come last: they are read while the tensor cores have work. In exact
    // mode, where a product has three times as many, they come first, while registers for sums are
    // still free.
    const int s = Mode::kWeights > 4 ? K::kSteps - 1 - i : i;
    std::uint32_t factors[Mode::kFactors];
    // Orders no data: without it the compiler issues all loads at once and runs out of registers.
    const bool shared = (s + 1) * K::kTiles > K::kRegisterProducts;
    if (K::kSharedProducts > 0 && (Mode::kWeights > 4 || shared)) rt::sync_warp();
    Mode::read(state, place.part * K::kSteps + s, place.lane, factors);
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      const int n = s * K::kTiles + m;
      if (n < K::kRegisterProducts) {
        Mode::multiply(sums[m][s % K::kChains], weights[n], factors);
      } else {
        std::uint32_t a[Mode::kWeights];
        RT_UNROLL for (int i = 0; i < Mode::kWeights; i += 4) {
          std::uint32_t four[4];
          rt::read(shared_weights<K>(place, n) + i * 32 + place.lane * 4, four);
          RT_UNROLL for (int k = 0; k < 4; ++k) a[i + k] = four[k];
        }
        Mode::multiply(sums[m][s % K::kChains], a, factors);
      }
    }
  }
}

template <class K>
RT_DEVICE float total(const Products<K>& sums, int tile, int v) {
  float sum = 0.0f;
  RT_UNROLL for (int c = 0; c < K::kChains; ++c) sum += K::Mode::total(sums[tile][c], v);
  return sum;
}

// The sums of the tiles that the warp owns, in `values`. Calls between() before the barrier.
//
// All warps of a band write their partial sums, the owners read them behind the band's barrier. The
// warps write the same words again in the next step: its state is complete only after the owners
// have sent theirs, and they send behind these reads.
template <class K, class Between>
RT_DEVICE void finish_product(const Products<K>& sums, const Place<K>& place, Values<K>& values,
                              Between between) {
  if constexpr (K::kParts == 1) {
    between();
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      RT_UNROLL for (int v = 0; v < 4; ++v) values[m][v] = total<K>(sums, m, v);
    }
  } else {
    // Where registers are scarce, every step computes the addresses again.
    const int warp = K::kSharedProducts > 0 ? rt::opaque(place.warp) : place.warp;
    const int band = warp % K::kBands;
    const auto parts = [&](int part, int tile) {
      const int index = (band * K::kParts + part) * K::kTiles + tile;
      return K::template at<float>(K::kPartialSums) + (index * 32 + place.lane) * 4;
    };
    RT_UNROLL for (int m = 0; m < K::kTiles; ++m) {
      std::uint32_t four[4];
      RT_UNROLL for (int v = 0; v < 4; ++v) four[v] = rt::bits_of(total<K>(sums, m, v));
      rt::store(parts(warp / K::kBands, m), four);
    }
    between();
    rt::sync_threads(1 + band, K::kParts * 32);
    if (!place.owner()) return;
    RT_UNROLL for (int m = 0; m < K::kOwned; ++m) {
      float sum[4] = {};
      RT_UNROLL for (int p = 0; p < K::kParts; ++p) {
        std::uint32_t four[4];
        rt::read(parts(p, warp / K::kBands * K::kOwned + m), four);
        RT_UNROLL for (int v = 0; v < 4; ++v) sum[v] += rt::float_of(four[v]);
      }
      RT_UNROLL for (int v = 0; v < 4; ++v) values[m][v] += sum[v];
    }
  }
}

}  // namespace rnnfast::cuda
