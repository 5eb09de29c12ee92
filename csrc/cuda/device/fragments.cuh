// Tiles of a state, 16 units by 8 rows of the batch, in the lanes of a warp.
//
// With g = lane / 4 and q = lane % 4 a lane computes on four values of a tile: value v is of unit
// g + 8 (v / 2) and column (row of the batch) 2 q + v % 2, as a tensor core returns its sums. It
// loads and stores words: Words says which.
//
// Mode says how stored values become factors of a product: Half as they are, Tf32 rounded, Exact in
// three parts of bfloat16 each, which are the 24 bits of a float32.
#pragma once

#include <type_traits>

#include "cuda/device/rt.cuh"
#include "cuda/problem.h"

namespace rnnfast::cuda {

constexpr int kColumns = 8;  // rows of the batch of a block
constexpr int kTileUnits = 16;

// 16-bit values: two words; word j is of column g, units 8 j + 2 q (low half) and the one after.
// The transposed tile, so that a lane has neighbours in memory.
template <class Stored>
struct Words {
  static constexpr int kCount = 2;
  static constexpr int kColumnsOfLane = 1;

  RT_DEVICE static int column(int lane, int /*word*/) { return lane / 4; }
  RT_DEVICE static int unit(int lane) { return lane % 4 * 2; }            // of word 0
  RT_DEVICE static constexpr int units_on(int word) { return 8 * word; }  // from there

  RT_DEVICE static void from_values(const float (&values)[4], std::uint32_t* words) {
    pack(values, words);
    unpack(words);
  }
  // from_values in two parts: pack rounds, unpack moves the values between lanes, which takes
  // longer.
  RT_DEVICE static void pack(const float (&values)[4], std::uint32_t* words) {
    RT_UNROLL for (int j = 0; j < 2; ++j) {
      words[j] = rt::pack(Stored{}, values[2 * j], values[2 * j + 1]);
    }
  }
  RT_DEVICE static void unpack(std::uint32_t* words) {
    RT_UNROLL for (int j = 0; j < 2; ++j) words[j] = rt::transpose(words[j]);
  }

  RT_DEVICE static void to_values(const std::uint32_t* words, float (&values)[4]) {
    RT_UNROLL for (int j = 0; j < 2; ++j) {
      const std::uint32_t pair = rt::transpose(words[j]);
      values[2 * j] = rt::widen(low(pair));
      values[2 * j + 1] = rt::widen(high(pair));
    }
  }

  // Calls with(kPaired), once around many words: each word then needs a predicate, no branch.
  template <class With>
  RT_DEVICE static void paired_or_not(bool paired, With with) {
    if (paired) {
      with(std::true_type{});
    } else {
      with(std::false_type{});
    }
  }

  // units: how many units of the word are inside.
  template <bool kPaired>
  RT_DEVICE static std::uint32_t load(const Stored* address, int units) {
    if constexpr (kPaired) {
      return units > 0 ? rt::load(reinterpret_cast<const std::uint32_t*>(address)) : 0;
    } else {
      const std::uint32_t first = units > 0 ? rt::load(address).bits : 0;
      const std::uint32_t second = units > 1 ? rt::load(address + 1).bits : 0;
      return first | second << 16;
    }
  }

  // load with branches, which keep the compiler from issuing many loads at once.
  RT_DEVICE static std::uint32_t load_here(const Stored* address, int units, bool paired) {
    if (units <= 0) return 0;
    if (paired) return *reinterpret_cast<const std::uint32_t*>(address);
    const std::uint32_t first = address[0].bits;
    return units == 1 ? first : first | static_cast<std::uint32_t>(address[1].bits) << 16;
  }

  template <bool kPaired>
  RT_DEVICE static void store(Stored* address, std::uint32_t word, int units) {
    if constexpr (kPaired) {
      if (units > 0) *reinterpret_cast<std::uint32_t*>(address) = word;
    } else {
      if (units > 0) address[0] = low(word);
      if (units > 1) address[1] = high(word);
    }
  }

  RT_DEVICE static Stored low(std::uint32_t pair) { return {static_cast<std::uint16_t>(pair)}; }
  RT_DEVICE static Stored high(std::uint32_t pair) {
    return {static_cast<std::uint16_t>(pair >> 16)};
  }
};

// float32: the four values themselves; eight lanes have neighbours in memory.
template <>
struct Words<float> {
  static constexpr int kCount = 4;
  static constexpr int kColumnsOfLane = 2;

  RT_DEVICE static int column(int lane, int word) { return lane % 4 * 2 + word % 2; }
  RT_DEVICE static int unit(int lane) { return lane / 4; }
  RT_DEVICE static constexpr int units_on(int word) { return word / 2 * 8; }

  RT_DEVICE static void from_values(const float (&values)[4], std::uint32_t* words) {
    RT_UNROLL for (int v = 0; v < 4; ++v) words[v] = rt::bits_of(values[v]);
  }
  RT_DEVICE static void pack(const float (&values)[4], std::uint32_t* words) {
    from_values(values, words);
  }
  RT_DEVICE static void unpack(std::uint32_t*) {}
  RT_DEVICE static void to_values(const std::uint32_t* words, float (&values)[4]) {
    RT_UNROLL for (int v = 0; v < 4; ++v) values[v] = rt::float_of(words[v]);
  }

  template <class With>
  RT_DEVICE static void paired_or_not(bool, With with) {
    with(std::true_type{});
  }
  template <bool>
  RT_DEVICE static std::uint32_t load(const float* address, int units) {
    return units > 0 ? rt::bits_of(rt::load(address)) : 0;
  }
  template <bool>
  RT_DEVICE static void store(float* address, std::uint32_t word, int units) {
    if (units > 0) *address = rt::float_of(word);
  }
};

// ------------------------------------------------------------------------------ modes
//
// A mode has: Stored; kDepth, units that one product goes over; kWeights and kFactors, the
// registers of its two sides; kSums, the sums that it is added to; kTileWords, 32-bit words of a
// tile of the state in shared memory. write() calls put(offset in the tile, words), once or for
// each part; read() returns factors from the words of all lanes. column() is the (first) column of
// a lane's words; lanes(rows) is how many lanes have a column among the first `rows`.

template <class Type>
struct Half {
  using Stored = Type;
  static constexpr int kDepth = 16;
  static constexpr int kWeights = 4;
  static constexpr int kFactors = 2;
  static constexpr int kSums = 1;
  static constexpr int kTileWords = 64;  // [lane][2]

  // 16 rows of W (or of its transpose) from w on; `rows` and `columns` of them are inside.
  template <bool kTransposed>
  RT_DEVICE static void weights(std::uint32_t* a, const Type* w, std::int64_t stride, int rows,
                                int columns, int lane, bool paired, int) {
    w += lane / 4 * stride + lane % 4 * 2;
    rows -= lane / 4;
    columns -= lane % 4 * 2;
    RT_UNROLL for (int i = 0; i < 4; ++i) {
      const int r = (kTransposed ? i / 2 : i % 2) * 8, c = (kTransposed ? i % 2 : i / 2) * 8;
      const int units = r < rows ? columns - c : 0;
      const std::uint32_t word = Words<Type>::load_here(w + r * stride + c, units, paired);
      a[i] = kTransposed ? rt::transpose(word) : word;
    }
  }

  // The words of a tile are factors already.
  template <class Put>
  RT_DEVICE static void write(int lane, const std::uint32_t (&words)[2], Put put) {
    put(lane * 2, words);
  }
  RT_DEVICE static int column(int lane) { return lane / 4; }
  RT_DEVICE static int lanes(int rows) { return 4 * rows; }

  RT_DEVICE static void read(const std::uint32_t* state, int step, int lane,
                             std::uint32_t (&b)[kFactors]) {
    rt::read(state + step * kTileWords + lane * 2, b);
  }

  RT_DEVICE static void multiply(float (&sums)[kSums][4], const std::uint32_t* a,
                                 const std::uint32_t* b) {
    rt::multiply(Type{}, sums[0], a, b);
  }

  RT_DEVICE static float total(const float (&sums)[kSums][4], int v) { return sums[0][v]; }
};

// A matrix of float32 (transposed: in memory it is), or 0 outside of it.
template <bool kTransposed>
struct Matrix {
  const float* w;
  std::int64_t stride;
  int rows, columns;  // in memory

  RT_DEVICE float operator()(int row, int column) const {
    const int r = kTransposed ? column : row, c = kTransposed ? row : column;
    return r < rows && c < columns ? w[r * stride + c] : 0.0f;
  }
};

struct Tf32 {
  using Stored = float;
  static constexpr int kDepth = 8;
  static constexpr int kWeights = 4;
  static constexpr int kFactors = 2;
  static constexpr int kSums = 1;
  static constexpr int kTileWords = 128;  // [lane][value]

  // A product may take its units in any order. In this one a lane writes its four words at once,
  // and reads two without a bank conflict in shared memory: factor j is unit
  // 4 (s % 2) + 2 j + q % 2 + 8 (q / 2) of tile s / 2.
  RT_DEVICE static int unit(int step, int j, int lane) {
    return step % 2 * 4 + 2 * j + lane % 2 + lane % 4 / 2 * 8;
  }

  // w: where the tile of step `step` begins.
  template <bool kTransposed>
  RT_DEVICE static void weights(std::uint32_t* a, const float* w, std::int64_t stride, int rows,
                                int columns, int lane, bool, int step) {
    const Matrix<kTransposed> at{w, stride, rows, columns};
    RT_UNROLL for (int i = 0; i < 4; ++i) {
      a[i] = rt::to_tf32(at(lane / 4 + i % 2 * 8, unit(step, i / 2, lane)));
    }
  }

  template <class Put>
  RT_DEVICE static void write(int lane, const std::uint32_t (&words)[4], Put put) {
    std::uint32_t rounded[4];
    RT_UNROLL for (int v = 0; v < 4; ++v) rounded[v] = rt::to_tf32(rt::float_of(words[v]));
    put(lane * 4, rounded);
  }
  RT_DEVICE static int column(int lane) { return lane % 4 * 2; }
  RT_DEVICE static int lanes(int rows) { return (rows + 1) / 2 * 8; }

  RT_DEVICE static void read(const std::uint32_t* state, int step, int lane,
                             std::uint32_t (&b)[kFactors]) {
    // The lane that wrote unit u, column c is 4 (u % 8) + c / 2, its value 2 (u / 8) + c % 2.
    const int column = lane / 4;
    const int first = (lane % 2 * 4 + column / 2) * 4 + lane % 4 / 2 * 2 + column % 2;
    const std::uint32_t* from = state + step / 2 * kTileWords + first;
    RT_UNROLL for (int j = 0; j < 2; ++j) b[j] = from[(step % 2 * 4 + 2 * j) * 16];
  }

  RT_DEVICE static void multiply(float (&sums)[kSums][4], const std::uint32_t* a,
                                 const std::uint32_t* b) {
    rt::multiply_tf32(sums[0], a, b);
  }

  RT_DEVICE static float total(const float (&sums)[kSums][4], int v) { return sums[0][v]; }
};

// x = x0 + x1 + x2 of bfloat16, each the rest that the ones before leave. We leave out
// the three smallest of the nine products, at most 2^-24 of the largest.
struct Exact {
  using Stored = float;
  static constexpr int kDepth = 16;
  static constexpr int kParts = 3;
  static constexpr int kWeights = 4 * kParts;
  static constexpr int kFactors = 2 * kParts;
  static constexpr int kSums = 2;                 // the largest products, the rest
  static constexpr int kTileWords = 64 * kParts;  // [part][lane][2]

  RT_DEVICE static void split(float first, float second, std::uint32_t (&pairs)[kParts]) {
    RT_UNROLL for (int part = 0; part < kParts; ++part) {
      pairs[part] = rt::pack(BFloat16{}, first, second);
      first = left(first, rt::widen(Words<BFloat16>::low(pairs[part])));
      second = left(second, rt::widen(Words<BFloat16>::high(pairs[part])));
    }
  }

  // inf leaves no rest, and a value that rounds to inf leaves none either.
  RT_DEVICE static float left(float value, float part) {
    return rt::is_finite(part) ? value - part : 0.0f;
  }

  template <bool kTransposed>
  RT_DEVICE static void weights(std::uint32_t* a, const float* w, std::int64_t stride, int rows,
                                int columns, int lane, bool, int) {
    const Matrix<kTransposed> at{w, stride, rows, columns};
    RT_UNROLL for (int i = 0; i < 4; ++i) {
      const int r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
      std::uint32_t pairs[kParts];
      split(at(r, c), at(r, c + 1), pairs);
      RT_UNROLL for (int part = 0; part < kParts; ++part) a[part * 4 + i] = pairs[part];
    }
  }

  template <class Put>
  RT_DEVICE static void write(int lane, const std::uint32_t (&words)[4], Put put) {
    std::uint32_t pairs[2][kParts];
    RT_UNROLL for (int j = 0; j < 2; ++j) {
      split(rt::float_of(words[2 * j]), rt::float_of(words[2 * j + 1]), pairs[j]);
    }
    RT_UNROLL for (int part = 0; part < kParts; ++part) {
      std::uint32_t two[2];
      RT_UNROLL for (int j = 0; j < 2; ++j) two[j] = rt::transpose(pairs[j][part]);
      put(part * 64 + lane * 2, two);
    }
  }
  RT_DEVICE static int column(int lane) { return lane / 4; }
  RT_DEVICE static int lanes(int rows) { return 4 * rows; }

  RT_DEVICE static void read(const std::uint32_t* state, int step, int lane,
                             std::uint32_t (&b)[kFactors]) {
    RT_UNROLL for (int part = 0; part < kParts; ++part) {
      std::uint32_t two[2];
      rt::read(state + step * kTileWords + part * 64 + lane * 2, two);
      b[part * 2] = two[0];
      b[part * 2 + 1] = two[1];
    }
  }

  RT_DEVICE static void multiply(float (&sums)[kSums][4], const std::uint32_t* a,
                                 const std::uint32_t* b) {
    // The sum is added here, which rounds to nearest: a tensor core truncates, always toward zero,
    // and those errors would accumulate over the recurrence.
    float largest[4] = {};
    rt::multiply(BFloat16{}, largest, a, b);
    RT_UNROLL for (int v = 0; v < 4; ++v) sums[0][v] += largest[v];
    RT_UNROLL for (int order = 2; order > 0; --order) {  // small ones first
      RT_UNROLL for (int part = 0; part <= order; ++part) {
        rt::multiply(BFloat16{}, sums[1], a + part * 4, b + (order - part) * 2);
      }
    }
  }

  // With an inf only the largest product is right: the rests of inf are 0.
  RT_DEVICE static float total(const float (&sums)[kSums][4], int v) {
    return sums[0][v] + (rt::is_finite(sums[1][v]) ? sums[1][v] : 0.0f);
  }
};

}  // namespace rnnfast::cuda
