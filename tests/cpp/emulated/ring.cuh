// A kernel that does nothing but what the cluster kernels will do: at every step each block sends a
// word of each of its threads to every block of the cluster, waits for all, and adds them up.
// RING_* plant the faults that the emulation is to find.
#pragma once

#include "../../../csrc/cuda/device/rt.cuh"

namespace ring {

namespace rt = rnnfast::cuda::rt;

struct Arguments {
  std::uint32_t* out;  // [blocks, threads]
  int steps, cluster, threads;
};

// Shared memory: two halves [cluster, threads] of words, two mbarriers.
constexpr int bytes(int cluster, int threads) { return 2 * cluster * threads * 4 + 16; }

RT_KERNEL(256) turn(Arguments a) {
  auto* words = reinterpret_cast<std::uint32_t*>(rt::shared());
  const int half = a.cluster * a.threads;
  auto* full = reinterpret_cast<std::uint64_t*>(rt::shared() + 2 * half * 4);
  const int thread = rt::thread(), rank = rt::cluster_rank();
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) {
      rt::mbarrier_init(&full[i], 1);
      rt::mbarrier_expect(&full[i], half * 4);
    }
    rt::mbarrier_fence();
  }
#ifndef RING_NO_START  // a peer may send to an mbarrier that nobody has made
  rt::sync_cluster();
#endif
  std::uint32_t value = static_cast<std::uint32_t>(rt::block_x() * a.threads + thread);
  for (int t = 0; t < a.steps; ++t) {
    const int i = t % 2;
    for (int other = 0; other < a.cluster; ++other) {
      const std::uint32_t to = rt::address_of(words + i * half + rank * a.threads + thread);
      rt::send(rt::in_block(to, other), {value}, rt::in_block(rt::address_of(&full[i]), other));
    }
#ifndef RING_NO_WAIT
#ifdef RING_PARITY
    rt::mbarrier_wait(&full[i], t / 2 % 2 ^ 1);
#else
    rt::mbarrier_wait(&full[i], t / 2 % 2);
#endif
#endif
    // For the step after next, which nobody can send for before this block has sent for the next.
    if (thread == 0 && t + 2 < a.steps) rt::mbarrier_expect(&full[i], half * 4);
    value = 0;
    for (int k = 0; k < half; ++k) value = value * 31 + words[i * half + k];
    value += static_cast<std::uint32_t>(rank * a.threads + thread);
    // All threads have read before any sends into what it has read, two steps from here.
    rt::sync_threads(1, a.threads);
#ifdef RING_EARLY_EXIT
    if (rank == 0 && t + 2 == a.steps) return;
#endif
  }
  a.out[rt::block_x() * a.threads + thread] = value;
  rt::sync_cluster();  // nobody leaves while a peer may send to it
}

}  // namespace ring
