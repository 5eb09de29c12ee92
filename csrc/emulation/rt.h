// csrc/cuda/device/rt.cuh on the host, one function for each of that file, by what PTX says of it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define RT_KERNEL(threads) static void
#define RT_DEVICE [[gnu::always_inline]] inline
#define RT_UNROLL

namespace rnnfast::cuda::rt {

using emulation::kLanes;
using emulation::planted;
using emulation::Slot;
using emulation::Where;

inline int thread() { return emulation::self().index; }
inline int block_x() { return emulation::self().block->x; }
inline int block_y() { return emulation::self().block->y; }
inline unsigned char* shared() { return emulation::self().block->shared; }

inline void sync_block(Where where = Where::current()) {
  if (planted(where, "left out")) return;
  emulation::Block& block = *emulation::self().block;
  emulation::wait_at(block.barriers[0], block.threads, "the threads of its block");
}

inline void sync_threads(int barrier, int threads, Where where = Where::current()) {
  if (planted(where, "left out")) return;
  emulation::wait_at(emulation::self().block->barriers[barrier], threads, "a named barrier");
}

inline int cluster_rank() { return emulation::self().block->rank; }
inline std::uint32_t address_of(const void* shared) { return emulation::address_of(shared); }
inline std::uint32_t in_block(std::uint32_t address, int rank) {
  return (address & 0xffffff) | static_cast<std::uint32_t>(rank) << 24;
}
inline void sync_cluster(Where where = Where::current()) {
  if (planted(where, "left out")) return;
  if (emulation::self().unfenced > 0) emulation::fail("an mbarrier that no fence has shown others");
  emulation::Cluster& cluster = *emulation::self().cluster;
  const int threads = emulation::self().block->threads * static_cast<int>(cluster.blocks.size());
  emulation::wait_at(cluster.barrier, threads, "the threads of its cluster");
}
inline void mbarrier_init(std::uint64_t* barrier, int arrivals, Where where = Where::current()) {
  if (planted(where, "left out")) return;
  ++emulation::self().unfenced;
  emulation::mbarrier_init(barrier, static_cast<std::uint32_t>(arrivals));
}
inline void mbarrier_fence(Where where = Where::current()) {
  if (!planted(where, "left out")) emulation::self().unfenced = 0;
}
inline void mbarrier_expect(std::uint64_t* barrier, int bytes, Where where = Where::current()) {
  if (planted(where, "left out")) return;
  emulation::mbarrier_update(barrier, 0, bytes);
  emulation::mbarrier_update(barrier, 1, 0);
}
inline void mbarrier_wait(std::uint64_t* barrier, int parity, Where where = Where::current()) {
  if (planted(where, "left out")) return;
  if (planted(where, "another parity")) parity ^= 1;
  while (emulation::mbarrier_phase(barrier) == (parity != 0)) emulation::yield("an mbarrier");
}
template <int kWords>
inline void send(std::uint32_t address, const std::uint32_t (&words)[kWords], std::uint32_t barrier,
                 Where where = Where::current()) {
  if (planted(where, "left out")) return;
  if (address % (4 * kWords)) emulation::fail("a store to no multiple of its bytes");
  const int times = planted(where, "twice") ? 2 : 1;
  for (int i = 0; i < times * kWords; ++i) {
    emulation::send({address + 4 * (i % kWords), words[i % kWords], barrier});
  }
}

// Operations of all lanes of a warp; two different ones must not meet.
enum Operation { kShuffle, kShuffleFrom, kAny, kSync, kTranspose, kMultiply, kMultiplyTf32 };

inline void sync_warp(Where where = Where::current()) {
  if (planted(where, "left out")) return;
  emulation::together(kSync, nullptr, 0, [](Slot*) {});
}

template <class T>
inline T shuffle_xor(T value, int lanes) {
  if constexpr (sizeof(T) == 8) {
    const auto both = std::bit_cast<std::uint64_t>(value);
    const std::uint64_t low = shuffle_xor(static_cast<std::uint32_t>(both), lanes);
    const std::uint64_t high = shuffle_xor(static_cast<std::uint32_t>(both >> 32), lanes);
    return std::bit_cast<T>(high << 32 | low);
  } else {
    const std::uint32_t word = std::bit_cast<std::uint32_t>(value);
    const Slot& mine = emulation::together(kShuffle, &word, 1, [lanes](Slot* slots) {
      for (int lane = 0; lane < kLanes; ++lane) slots[lane].out[0] = slots[lane ^ lanes].in[0];
    });
    return std::bit_cast<T>(mine.out[0]);
  }
}

// The value of lane `from`; lanes may name different ones.
template <class T>
inline T shuffle(T value, int from) {
  const std::uint32_t words[2] = {std::bit_cast<std::uint32_t>(value),
                                  static_cast<std::uint32_t>(from)};
  const Slot& mine = emulation::together(kShuffleFrom, words, 2, [](Slot* slots) {
    for (int lane = 0; lane < kLanes; ++lane) {
      slots[lane].out[0] = slots[slots[lane].in[1] % kLanes].in[0];
    }
  });
  return std::bit_cast<T>(mine.out[0]);
}

inline bool any(bool condition, Where where = Where::current()) {
  if (planted(where, "each lane by itself")) return condition;
  const std::uint32_t word = planted(where, "never") ? false : condition;
  const Slot& mine = emulation::together(kAny, &word, 1, [](Slot* slots) {
    std::uint32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found |= slots[lane].in[0];
    for (int lane = 0; lane < kLanes; ++lane) slots[lane].out[0] = found;
  });
  return mine.out[0] != 0;
}

inline std::uint32_t transpose(std::uint32_t word) {
  const Slot& mine = emulation::together(kTranspose, &word, 1, [](Slot* slots) {
    const auto element = [slots](int row, int column) {
      return slots[row * 4 + column / 2].in[0] >> (column % 2 * 16) & 0xffff;
    };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      slots[lane].out[0] = element(column, row) | element(column + 1, row) << 16;
    }
  });
  return mine.out[0];
}

// ------------------------------------------------------------------------------ arithmetic

inline float widen(float value) { return value; }
inline std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

inline float widen(BFloat16 value) {
  return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

inline std::uint16_t narrow(BFloat16, float value) {
  const std::uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// By steps of the format, so that no compiler need have it.
inline float widen(Float16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) magnitude = fraction ? std::nanf("") : HUGE_VALF;
  if (exponent > 0 && exponent < 31) {
    magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return value.bits >> 15 ? -magnitude : magnitude;
}

inline std::uint16_t narrow(Float16, float value) {
  if (std::isnan(value)) return 0x7fff;
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // A unit of the last place; of subnormal numbers, which continue the others, always the same.
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  const auto units =
      static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<std::uint16_t>(sign |
                                    ((static_cast<std::uint32_t>(exponent + 14) << 10) + units));
}

template <class Type>
inline std::uint32_t pack(Type type, float low, float high) {
  return narrow(type, low) | static_cast<std::uint32_t>(narrow(type, high)) << 16;
}

inline std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = bits_of(value);
  return std::isnan(value) ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
}

// An approximate instruction: it errs by up to `most`, what the PTX ISA allows; by how much, and up
// or down, the bits of the exact number say. Subnormal results are 0 (.ftz).
inline float approximate(double exact, double most) {
  const float nearest = static_cast<float>(exact);
  if (!std::isfinite(nearest) || nearest == 0) return nearest;
  if (std::fabs(exact) < 0x1p-126) return std::copysign(0.0f, nearest);
  const std::uint64_t mixed = std::bit_cast<std::uint64_t>(exact) * 0x9e3779b97f4a7c15u;
  const double part = std::ldexp(static_cast<double>(mixed >> 11), -52) - 1;  // -1 to 1
  const float found = static_cast<float>(exact + part * most);
  // Rounding must not take it further away than allowed.
  return std::fabs(found - exact) <= most ? found : std::nextafter(found, nearest);
}

// The unit in the last place of a float32; 0 where there is none: at 0, infinity and NaN.
inline double ulp(double x) {
  return x != 0 && std::isfinite(x) ? std::ldexp(1.0, std::ilogb(x) - 23) : 0;
}

// ex2.approx.ftz: 2 ulp, and exact of 0. Its argument is rounded before.
inline float exp(float x) {
  const float power = x * 1.4426950408889634f;
  const double exact = std::exp2(static_cast<double>(power));
  return power == 0 ? 1 : approximate(exact, 2 * ulp(exact));
}
// rcp.approx.ftz: 1 ulp.
inline float reciprocal(float x) {
  const double exact = 1 / static_cast<double>(std::fabs(x) < 0x1p-126f ? 0 * x : x);
  return approximate(exact, ulp(exact));
}
// rsqrt.approx: a relative 2^-22.9.
inline float inverse_root(float x) {
  const double exact = 1 / std::sqrt(static_cast<double>(x));
  return approximate(exact, exact * 0x1.125p-23);
}
inline float fast_inverse_root(float x) { return inverse_root(x < 0x1p-126f ? 0 : x); }
// tanh.approx: a relative 2^-11.
inline float rough_tanh(float x) {
  const double exact = std::tanh(static_cast<double>(x));
  return approximate(exact, std::fabs(exact) * 0x1p-11);
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float at_most(float x, float most, float a, float b) { return x <= most ? a : b; }
inline float saturate(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }
template <class T>
inline T opaque(T x) {
  return x;
}
inline float with_sign(float x, float of) { return std::copysign(x, of); }
inline bool is_finite(float x) { return std::isfinite(x); }
inline float magnitude(float x) { return std::fabs(x); }

// ------------------------------------------------------------------------------ tensor cores

template <class Type>
inline float half_of(std::uint32_t word, int high) {
  return widen(Type{static_cast<std::uint16_t>(high ? word >> 16 : word)});
}

// A sum of one number and kTerms products as a tensor core has it (Fasi et al. 2021): aligned to
// the largest of them, with one bit more than a float32 has; what lies below is cut off, and so is
// what the sum has no room for. A kernel must not count on more.
template <int kTerms>
inline float sum_of_tensor_core(float start, const double (&terms)[kTerms]) {
  double largest = std::fabs(start), plain = start;
  for (double term : terms) {
    largest = std::max(largest, std::fabs(term));
    plain += term;
  }
  if (!std::isfinite(plain)) return static_cast<float>(plain);
  if (largest == 0) return start;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest) - 24, -149));
  double units = std::trunc(start / unit);
  for (double term : terms) units += std::trunc(term / unit);
  // Toward zero, to the digits of a float32.
  const double sum = units * unit;
  const float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// d += a b of a warp, some terms at a time.
template <int kDepth, class Factor>
inline void product(Slot* slots, Factor factor) {
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    const std::uint32_t* words = slots[lane].in + 4;
    if constexpr (kDepth == 16) {
      for (int i = 0; i < 4; ++i) {
        for (int high = 0; high < 2; ++high) {
          const int k = 2 * q + high + i / 2 * 8;
          a[g + i % 2 * 8][k] = factor(words[i], high);
          if (i < 2) b[2 * q + high + i * 8][g] = factor(words[4 + i], high);
        }
      }
    } else {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][q + i / 2 * 4] = factor(words[i], 0);
        if (i < 2) b[q + i * 4][g] = factor(words[4 + i], 0);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = float_of(slots[lane].in[i]);
      constexpr int kTerms = kDepth == 16 ? 8 : 4;
      for (int k = 0; k < kDepth; k += kTerms) {
        double terms[kTerms];
        for (int n = 0; n < kTerms; ++n) {
          terms[n] = static_cast<double>(a[row][k + n]) * b[k + n][column];
        }
        sum = sum_of_tensor_core(sum, terms);
      }
      slots[lane].out[i] = bits_of(sum);
    }
  }
}

template <int kDepth, class Factor>
inline void multiply(int operation, float (&d)[4], const std::uint32_t* a, const std::uint32_t* b,
                     Factor factor) {
  std::uint32_t words[10];
  std::memcpy(words, d, sizeof d);
  std::copy(a, a + 4, words + 4);
  std::copy(b, b + 2, words + 8);
  const Slot& mine = emulation::together(operation, words, 10,
                                         [factor](Slot* slots) { product<kDepth>(slots, factor); });
  std::memcpy(d, mine.out, sizeof d);
}

template <class Type>
inline void multiply(Type, float (&d)[4], const std::uint32_t* a, const std::uint32_t* b) {
  multiply<16>(kMultiply, d, a, b,
               [](std::uint32_t word, int i) { return half_of<Type>(word, i); });
}

// The tensor core cuts off what a TF32 number has no room for.
inline void multiply_tf32(float (&d)[4], const std::uint32_t* a, const std::uint32_t* b) {
  multiply<8>(kMultiplyTf32, d, a, b,
              [](std::uint32_t word, int) { return float_of(word & ~0x1fffu); });
}

template <class T>
inline T load(const T* address) {
  return *address;
}

template <int kWords>
inline void store(void* to, const std::uint32_t (&words)[kWords]) {
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof words) {
    emulation::fail("an access at no multiple of its bytes");
  }
  std::memcpy(to, words, sizeof words);
}

template <int kWords>
inline void read(const void* from, std::uint32_t (&words)[kWords]) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof words) {
    emulation::fail("an access at no multiple of its bytes");
  }
  std::memcpy(words, from, sizeof words);
}

}  // namespace rnnfast::cuda::rt
