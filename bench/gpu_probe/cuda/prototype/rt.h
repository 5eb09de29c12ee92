// The primitives of the two kernels beside this file, on top of the probes' own: every wait ends.
#pragma once
#include "../probe.cuh"

#define RNN_KERNEL __global__
#define RNN_DEV __device__ __forceinline__
#define RNN_SMEM(name) DYNAMIC_SHARED(name)

namespace rt {
RNN_DEV int tid() { return static_cast<int>(threadIdx.x); }
RNN_DEV int bid() { return static_cast<int>(blockIdx.x); }
RNN_DEV void sync_block() { __syncthreads(); }
RNN_DEV void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

RNN_DEV uint32_t smem_addr(const void* p) { return ptx::shared_address(p); }
RNN_DEV uint32_t cta_rank() { return ptx::cluster_rank(); }
RNN_DEV uint32_t mapa(uint32_t address, uint32_t rank) { return ptx::map_to_rank(address, rank); }
RNN_DEV void cluster_sync() { ptx::cluster_barrier(); }
RNN_DEV void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait;" ::: "memory");
}

RNN_DEV void mbar_init(uint64_t* b, uint32_t n) { ptx::barrier_init(smem_addr(b), n); }
RNN_DEV void fence_mbar_init() { ptx::fence_barrier_init(); }
RNN_DEV void mbar_arm(uint64_t* b, uint32_t bytes) { ptx::barrier_expect(smem_addr(b), bytes); }
RNN_DEV void mbar_wait(uint64_t* b, uint32_t parity) {
  const uint32_t barrier = smem_addr(b);
  const auto arrived = [&] { return ptx::barrier_try_wait<ptx::Acquire::kCta>(barrier, parity); };
  if (!wait_until(arrived)) __trap();  // these kernels cannot go on: the launch fails
}
RNN_DEV void st_async(uint32_t address, uint32_t v, uint32_t barrier) {
  const uint32_t word[1] = {v};
  ptx::store_async(address, word, barrier);
}

RNN_DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ptx::mma<ptx::Operand::kBf16>(d, a, b);
}
RNN_DEV uint32_t movmatrix(uint32_t v) { return ptx::transpose_8x8(v); }
RNN_DEV float shfl_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

RNN_DEV float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RNN_DEV uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
RNN_DEV float bf16_to_f32(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
template <class T>
RNN_DEV T ldg(const T* p) {
  return __ldg(p);
}
RNN_DEV void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
}  // namespace rt
