// Everything that a kernel asks of the device: the only file with PTX. Compiled for the host the
// same names come from csrc/emulation/rt.h, and the same kernels run there, in the tests.
#pragma once

#include <cstdint>

namespace rnnfast::cuda {

// 16-bit floats in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

}  // namespace rnnfast::cuda

#ifdef RNNFAST_EMULATION
#include "emulation/rt.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RT_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define RT_DEVICE __device__ __forceinline__
#define RT_UNROLL _Pragma("unroll")

namespace rnnfast::cuda::rt {

// ------------------------------------------------------------------------------ who and where

RT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
RT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
RT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }

// The shared memory that the launch asked for; whatever was in it before.
RT_DEVICE unsigned char* shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// All threads of the block: what any has written before, all may read after.
RT_DEVICE void sync_block() { __syncthreads(); }

// Waits for `threads` threads at one named barrier, 1 to 15.
RT_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------ in a cluster
// From sm_90 on. Addresses of shared memory are 32 bits wide, and in_block turns one of this block
// into the same place of another.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define RT_SM90(...)
#else
#define RT_SM90(...) __VA_ARGS__
#endif

RT_DEVICE int cluster_rank() {
  std::uint32_t rank = 0;
  RT_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));)
  return static_cast<int>(rank);
}

RT_DEVICE std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

RT_DEVICE std::uint32_t in_block(std::uint32_t address, int rank) {
  std::uint32_t there = 0;
  RT_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));)
  return there;
}

// All threads of the cluster: what any has written before, all may read after. With fences of the
// whole device: for before a loop, and behind it.
RT_DEVICE void sync_cluster() {
  RT_SM90(asm volatile("barrier.cluster.arrive.release.aligned;\n"
                       "barrier.cluster.wait.acquire.aligned;" :: : "memory");)
}

// An mbarrier completes a phase when so many threads have arrived at it and all bytes that were
// expected have come. Before another block may use it: fence, then sync_cluster.
RT_DEVICE void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  RT_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)),
                       "r"(arrivals) : "memory");)
}
RT_DEVICE void mbarrier_fence() {
  RT_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory");)
}

// Arrives, and expects so many bytes more in this phase.
RT_DEVICE void mbarrier_expect(std::uint64_t* barrier, int bytes) {
  RT_SM90(asm volatile(
              "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)),
              "r"(bytes) : "memory");)
}

// Until the phase of this parity is complete: what was sent for it is there.
RT_DEVICE void mbarrier_wait(std::uint64_t* barrier, int parity) {
  RT_SM90(asm volatile("{\n.reg .pred done;\n"
                       "again%=:\n"
                       "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                       "@!done bra again%=;\n}" ::"r"(address_of(barrier)),
                       "r"(parity) : "memory");)
}

// 4, 8 or 16 bytes into a block of the cluster, some time; the mbarrier there counts them when they
// have come.
RT_DEVICE void send(std::uint32_t address, const std::uint32_t (&w)[1], std::uint32_t barrier) {
  RT_SM90(asm volatile(
              "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                  address),
              "r"(w[0]), "r"(barrier) : "memory");)
}
RT_DEVICE void send(std::uint32_t address, const std::uint32_t (&w)[2], std::uint32_t barrier) {
  RT_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 "
                       "[%0], {%1, %2}, [%3];" ::"r"(address),
                       "r"(w[0]), "r"(w[1]), "r"(barrier) : "memory");)
}
RT_DEVICE void send(std::uint32_t address, const std::uint32_t (&w)[4], std::uint32_t barrier) {
  RT_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
                       "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                       "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(barrier) : "memory");)
}

// ------------------------------------------------------------------------------ in a warp
// All 32 lanes call these together: volatile, so that no compiler moves one behind a branch.

// All reads and writes of all lanes before this are done before any lane goes on.
RT_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
RT_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

template <class T>
RT_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

RT_DEVICE bool any(bool condition) { return __any_sync(0xffffffffu, condition); }

// The 8 x 8 matrix whose row r is in lanes 4 r to 4 r + 3, two 16-bit values each, transposed.
RT_DEVICE std::uint32_t transpose(std::uint32_t word) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
  return out;
}

// d += a b on a tensor core, a 16 x 16 (or 16 x 8 of TF32), b with 8 columns. With g = lane / 4 and
// q = lane % 4 a lane has d of rows g and g + 8, columns 2 q and 2 q + 1; the factors as PTX has
// them under "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".
RT_DEVICE void multiply(BFloat16, float (&d)[4], const std::uint32_t* a, const std::uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RT_DEVICE void multiply(Float16, float (&d)[4], const std::uint32_t* a, const std::uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RT_DEVICE void multiply_tf32(float (&d)[4], const std::uint32_t* a, const std::uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ------------------------------------------------------------------------------ arithmetic

// Two values rounded to nearest even, the first in the low half.
RT_DEVICE std::uint32_t pack(BFloat16, float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

RT_DEVICE std::uint32_t pack(Float16, float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

RT_DEVICE float widen(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}

RT_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

RT_DEVICE float widen(float value) { return value; }

RT_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
RT_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

// The nearest TF32 number: the tensor core would cut the digits off.
RT_DEVICE std::uint32_t to_tf32(float value) {
  std::uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(value));
  return out;
}

// These two volatile, so that they stay in the order in which they stand: several under way at
// once. Within 2 ulp and the rounding of x log2(e); 0 where the result would be subnormal.
RT_DEVICE float exp(float x) {
  float out;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * 1.4426950408889634f));
  return out;
}
// 1 / x within 1 ulp; 0 from 2^126 on.
RT_DEVICE float reciprocal(float x) {
  float out;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// Within a relative 2^-11.
RT_DEVICE float rough_tanh(float x) {
  float out;
  asm("tanh.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// x <= most ? a : b, of two values that are both computed: what a compiler makes of a choice is
// often one after the other, each behind a predicate, of which there are few.
RT_DEVICE float at_most(float x, float most, float a, float b) {
  float out;
  asm("{\n.reg .pred small;\n"
      "setp.le.f32 small, %1, %2;\n"
      "selp.f32 %0, %3, %4, small;\n}"
      : "=f"(out)
      : "f"(x), "f"(most), "f"(a), "f"(b));
  return out;
}
RT_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a b + c
RT_DEVICE float saturate(float x) { return __saturatef(x); }                   // to 0 and 1
// x, of which the compiler no longer knows that it is the same elsewhere: what is made of it it
// makes again, and keeps in no register until then.
RT_DEVICE float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
RT_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
RT_DEVICE float with_sign(float x, float of) { return copysignf(x, of); }
// Both within a relative 2^-22.9; the second is one instruction, and inf where x is subnormal.
RT_DEVICE float inverse_root(float x) {
  float out;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
RT_DEVICE float fast_inverse_root(float x) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
RT_DEVICE bool is_finite(float x) { return fabsf(x) < __builtin_inff(); }
RT_DEVICE float magnitude(float x) { return fabsf(x); }

// Words of shared memory, side by side from a multiple of their bytes on.
RT_DEVICE void store(void* to, const std::uint32_t (&w)[2]) {
  *static_cast<uint2*>(to) = {w[0], w[1]};
}
RT_DEVICE void store(void* to, const std::uint32_t (&w)[4]) {
  *static_cast<uint4*>(to) = {w[0], w[1], w[2], w[3]};
}
RT_DEVICE void read(const void* from, std::uint32_t (&w)[2]) {
  const uint2 words = *static_cast<const uint2*>(from);
  w[0] = words.x, w[1] = words.y;
}
RT_DEVICE void read(const void* from, std::uint32_t (&w)[4]) {
  const uint4 words = *static_cast<const uint4*>(from);
  w[0] = words.x, w[1] = words.y, w[2] = words.z, w[3] = words.w;
}

// Loads memory that no thread of this launch writes.
template <class T>
RT_DEVICE T load(const T* address) {
  return __ldg(address);
}
RT_DEVICE BFloat16 load(const BFloat16* address) { return {__ldg(&address->bits)}; }
RT_DEVICE Float16 load(const Float16* address) { return {__ldg(&address->bits)}; }

}  // namespace rnnfast::cuda::rt

#endif
