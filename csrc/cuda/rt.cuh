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
#define RT_UNROLL_2 _Pragma("unroll 2")  // where all at once would take too many registers

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

// Those of one named barrier, 1 to 15, of which there are so many.
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

// 4 bytes into a block of the cluster, some time; the mbarrier there counts them when they have
// come.
RT_DEVICE void send(std::uint32_t address, std::uint32_t value, std::uint32_t barrier) {
  RT_SM90(asm volatile(
              "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                  address),
              "r"(value), "r"(barrier) : "memory");)
}

// ------------------------------------------------------------------------------ in a warp
// All 32 lanes call these together: volatile, so that no compiler moves one behind a branch.

template <class T>
RT_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
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

RT_DEVICE float exp(float x) { return __expf(x); }
RT_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
RT_DEVICE float quick_divide(float a, float b) { return __fdividef(a, b); }
RT_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
RT_DEVICE bool is_finite(float x) { return fabsf(x) < __builtin_inff(); }
RT_DEVICE float magnitude(float x) { return fabsf(x); }
RT_DEVICE float larger(float a, float b) {
  return fmaxf(a, b);
}  // of a number and a NaN the number

// What no thread of this launch writes.
template <class T>
RT_DEVICE T load(const T* address) {
  return __ldg(address);
}
RT_DEVICE BFloat16 load(const BFloat16* address) { return {__ldg(&address->bits)}; }
RT_DEVICE Float16 load(const Float16* address) { return {__ldg(&address->bits)}; }

}  // namespace rnnfast::cuda::rt

#endif
