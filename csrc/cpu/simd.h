// Vectors of one SIMD level, written once in GCC/Clang vector extensions.
//
// Everything that depends on the level lives in a namespace named after it: the same source is
// compiled once per level, and without that the linker would keep one copy of each inline function,
// AVX-512 code in the portable path among them. For the same reason no std:: template is used here.
#pragma once

#include <cstdint>

#if defined(RNNFAST_SIMD_AVX512)
#define RNNFAST_LEVEL avx512
#include <immintrin.h>
#elif defined(RNNFAST_SIMD_AVX2)
#define RNNFAST_LEVEL avx2
#include <immintrin.h>
#else
#define RNNFAST_LEVEL portable
#endif

#define RNNFAST_INLINE [[gnu::always_inline]] inline
// After a lambda's parameters: not inlined it would hold what it captures in memory.
#define RNNFAST_INLINE_LAMBDA __attribute__((always_inline))

namespace rnnfast::cpu::RNNFAST_LEVEL {

using std::int64_t;

#if defined(RNNFAST_SIMD_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers
constexpr int kTileRows = 8;       // at most
constexpr int kRowsOfTile = 8;     // where the left operand lies in rows
#elif defined(RNNFAST_SIMD_AVX2)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16 registers
constexpr int kTileRows = 6;
constexpr int kRowsOfTile = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 24;
constexpr int kTileRows = 8;
constexpr int kRowsOfTile = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;
constexpr int kTileRows = 6;
constexpr int kRowsOfTile = 4;
#endif

// Storage of the 2-byte types. Not _Float16: GCC has it in C++ from version 12 on only.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
using Bits32 = Vec<std::uint32_t>;
using Bits16 = VectorOf<std::uint16_t, kVectorBytes / 2>::type;

// The type a storage type is computed in, and a vector of it as it lies in memory.
template <class S>
struct StorageTraits {
  using Arithmetic = float;
  using Raw = Bits16;
};
template <>
struct StorageTraits<float> {
  using Arithmetic = float;
  using Raw = Vec<float>;
};
template <>
struct StorageTraits<double> {
  using Arithmetic = double;
  using Raw = Vec<double>;
};
template <class S>
using Arithmetic = typename StorageTraits<S>::Arithmetic;
template <class S>
using Raw = typename StorageTraits<S>::Raw;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class To, class From>
RNNFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// "x - 0" folds to x; "0 + x" would be an addition, because of -0.
template <class A>
RNNFAST_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}

template <class S>
RNNFAST_INLINE Raw<S> load_raw(const S* from) {
  Raw<S> raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return raw;
}

template <class S>
RNNFAST_INLINE void store_raw(S* to, Raw<S> raw) {
  __builtin_memcpy(to, &raw, sizeof(raw));
}

#if !defined(RNNFAST_SIMD_AVX512)
// Halves of a vector, of what is left of it and so on: a branch for each, always the same way while
// the count stays, instead of a loop over lanes.
template <class S>
RNNFAST_INLINE void copy_lanes(S* to, const S* from, int64_t count) {
#pragma GCC unroll 4
  for (int piece = kLanes<Arithmetic<S>> / 2; piece > 0; piece /= 2) {
    if ((count & piece) == 0) continue;
    __builtin_memcpy(to, from, piece * sizeof(S));
    to += piece;
    from += piece;
  }
}
#endif

// The first `count` lanes (0 < count < lanes); memory beyond them is not touched, the rest reads 0.
template <class S>
RNNFAST_INLINE Raw<S> load_raw(const S* from, int64_t count) {
#if defined(RNNFAST_SIMD_AVX512)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) {
    return Raw<S>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
  } else if constexpr (sizeof(S) == 4) {
    return Raw<S>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from));
  } else {
    return Raw<S>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
  }
#elif defined(RNNFAST_SIMD_AVX2)
  if constexpr (sizeof(S) == 8) {
    const auto mask = splat(count) > Vec<int64_t>{0, 1, 2, 3};
    return Raw<S>(_mm256_maskload_pd(from, (__m256i)mask));
  } else if constexpr (sizeof(S) == 4) {
    const auto mask = splat(static_cast<int>(count)) > Vec<int>{0, 1, 2, 3, 4, 5, 6, 7};
    return Raw<S>(_mm256_maskload_ps(from, (__m256i)mask));
  } else {  // whole pairs of lanes, then the last lane, which an odd count leaves out
    const Bits16 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const auto rest = static_cast<std::uint16_t>(count) - lane;
    const __m128i mask =
        _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count / 2)), _mm_setr_epi32(0, 1, 2, 3));
    const auto pairs = Bits16(_mm_maskload_epi32(reinterpret_cast<const int*>(from), mask));
    return rest == 1 ? from[count - 1].bits - Bits16{} : pairs;
  }
#else
  Raw<S> raw = {};
  copy_lanes(reinterpret_cast<S*>(&raw), from, count);
  return raw;
#endif
}

template <class S>
RNNFAST_INLINE void store_raw(S* to, Raw<S> raw, int64_t count) {
#if defined(RNNFAST_SIMD_AVX512)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)raw);
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)raw);
  } else {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), (__m256i)raw);
  }
#else
  // Not masked on AVX2: Zen 3 is slower at that.
  copy_lanes(to, reinterpret_cast<const S*>(&raw), count);
#endif
}

RNNFAST_INLINE Vec<float> widen_half(Bits16 raw) {
  const Bits32 bits = __builtin_convertvector(raw, Bits32);
  const Bits32 magnitude = (bits & 0x7fffu) << 13;
  // From bias 15 to bias 127; a subnormal stands behind the leading 1 of 2^-14, which is then taken
  // away. (No product with 2^112: its operand would be a subnormal float, which may count as zero.)
  const Bits32 normal = magnitude + (112u << 23);
  const Vec<float> raised = bit_cast<Vec<float>>(magnitude + (113u << 23)) - 0x1p-14f;
  const Bits32 special = magnitude | 0x7f800000u;  // inf and NaN keep the highest exponent
  Bits32 value = magnitude < (1u << 23) ? bit_cast<Bits32>(raised) : normal;
  value = magnitude >= (0x7c00u << 13) ? special : value;
  return bit_cast<Vec<float>>(value | ((bits & 0x8000u) << 16));
}

RNNFAST_INLINE Bits16 narrow_half(Vec<float> value) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 magnitude = bits & 0x7fffffffu;
  // Normal results: drop 13 bits of the mantissa, to even; a carry runs into the exponent (and
  // from 65504 into infinity) by itself.
  const Bits32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 makes the hardware round at 2^-24.
  const Bits32 shifted = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + 0.5f);
  const Bits32 subnormal = shifted - (126u << 23);
  const Bits32 zero = {};
  const Bits32 infinite = zero + 0x7c00u;
  const Bits32 quiet = zero + 0x7e00u;
  Bits32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? infinite : half;
  half = magnitude > (255u << 23) ? quiet : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Bits16);
}

RNNFAST_INLINE Bits16 narrow_bfloat(Vec<float> value) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // Rounding could carry a NaN into infinity.
  const Bits32 kept = (bits & 0x7fffffffu) > (255u << 23) ? (bits | 0x400000u) : rounded;
  return __builtin_convertvector(kept >> 16, Bits16);
}

template <class S>
RNNFAST_INLINE Vec<Arithmetic<S>> widen(Raw<S> raw) {
  if constexpr (sizeof(S) == 2 && __is_same(S, Float16)) {
    return widen_half(raw);
  } else if constexpr (sizeof(S) == 2) {
    return bit_cast<Vec<float>>(__builtin_convertvector(raw, Bits32) << 16);
  } else {
    return raw;
  }
}

template <class S>
RNNFAST_INLINE Raw<S> narrow(Vec<Arithmetic<S>> value) {
  if constexpr (sizeof(S) == 2 && __is_same(S, Float16)) {
    return narrow_half(value);
  } else if constexpr (sizeof(S) == 2) {
    return narrow_bfloat(value);
  } else {
    return value;
  }
}

// With a count: as many lanes as there are, all of them from kLanes on.
template <class S>
RNNFAST_INLINE Vec<Arithmetic<S>> load(const S* from) {
  return widen<S>(load_raw(from));
}
template <class S>
RNNFAST_INLINE Vec<Arithmetic<S>> load(const S* from, int64_t count) {
  return widen<S>(count >= kLanes<Arithmetic<S>> ? load_raw(from) : load_raw(from, count));
}
template <class S>
RNNFAST_INLINE void store(S* to, Raw<S> raw, int64_t count) {
  if (count >= kLanes<Arithmetic<S>>) {
    store_raw(to, raw);
  } else {
    store_raw(to, raw, count);
  }
}

// The same for a count that is known to be whole when it is compiled: without the branch.
template <bool kWhole, class S>
RNNFAST_INLINE Vec<Arithmetic<S>> load_if(const S* from, int64_t count) {
  return kWhole ? load(from) : load(from, count);
}
template <bool kWhole, class S>
RNNFAST_INLINE void store_if(S* to, Raw<S> raw, int64_t count) {
  if constexpr (kWhole) {
    store_raw(to, raw);
  } else {
    store(to, raw, count);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
