// Question 4: what does it cost to agree through L2? One hop between two SMs, and a step of a grid
// of 32 to all SMs in two forms: a counter (release, acquire), and data that is its own flag
// (relaxed 16-byte packets, every word of which carries the step number).
#include "probe.cuh"

constexpr int kThreads = 256;

// --- one hop -------------------------------------------------------------------------------------

struct Hop {
  int partner;        // block 0 plays against this block
  int rounds;         // round trips
  uint32_t* flags;    // [2][32], one line each, 0 at the start
  long long* cycles;  // [1] for all rounds, by the clock of block 0
};

template <bool kOrdered>
__global__ void l2_hop(Hop p) {
  const int me = static_cast<int>(blockIdx.x);
  if (threadIdx.x != 0 || (me != 0 && me != p.partner)) return;
  uint32_t* mine = p.flags + (me == 0 ? 0 : 32);    // the other one writes it
  uint32_t* theirs = p.flags + (me == 0 ? 32 : 0);  // this one writes it
  const auto send = [&](int round) {
    if constexpr (kOrdered) {
      ptx::store_release(theirs, round + 1);
    } else {
      ptx::store_relaxed(theirs, round + 1);
    }
  };
  const auto arrived = [&](int round) {
    const uint32_t wanted = round + 1;
    if constexpr (kOrdered) return ptx::load_acquire(mine) == wanted;
    return ptx::load_relaxed(mine) == wanted;
  };
  const long long begin = clock64();
  if (me == 0) send(0);
  for (int round = 0; round < p.rounds; ++round) {
    if (!wait_until([&] { return arrived(round); })) break;
    if (me != 0) {
      send(round);
    } else if (round + 1 < p.rounds) {
      send(round + 1);
    }
  }
  if (me == 0) *p.cycles = clock64() - begin;
}

template <bool kOrdered>
void measure_hop(const char* form) {
  constexpr int kRounds = 500, kRepeats = 3;
  const int sms = sm_count();
  Buffer<uint32_t> flags(64);
  Buffer<long long> cycles(1);
  const Shape shape{.grid = sms, .block = 32, .cooperative = true};
  std::vector<double> hops;
  for (int partner = 1; partner < sms; ++partner)
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      flags.fill(0);
      launch(l2_hop<kOrdered>, shape, Hop{partner, kRounds, flags.get(), cycles.get()});
      finish("L2 hop");
      if (repeat > 0) hops.push_back(static_cast<double>(cycles.host()[0]) / kRounds / 2);
    }
  Figure("l2_hop").with("form", form).print(hops, "cycles");
}

// --- a grid step, counter form -------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 1)
    counter_barrier(int steps, uint32_t* counter, long long* cycles) {
  const long long begin = clock64();
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // everybody's work of this step is done
    if (threadIdx.x == 0) {
      const uint32_t all = gridDim.x * static_cast<uint32_t>(step + 1);
      ptx::add_release(counter, 1);
      wait_until([&] { return ptx::load_acquire(counter) >= all; });
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
}

// --- a grid step, data as flag -------------------------------------------------------------------

struct Gather {
  int steps;
  int packets;        // of 16 bytes, from each block a step; at most kThreads
  uint4* ring;        // [2][grid][packets], no word a step number at the start
  long long* cycles;  // [grid]
};

__device__ __forceinline__ bool all_words(uint4 v, uint32_t word) {
  return v.x == word && v.y == word && v.z == word && v.w == word;
}

// Every block posts its packets and reads everybody's. Two slots are enough: a block posts step
// s + 2 over step s only after it saw everybody's s + 1, which each posted after it had read all of
// s (the __syncthreads between reading and posting).
template <int kEach>  // packets that one thread reads
__global__ void __launch_bounds__(kThreads, 1) gather_step(Gather p) {
  const int tid = static_cast<int>(threadIdx.x);
  const int total = static_cast<int>(gridDim.x) * p.packets;
  const long long begin = clock64();
  for (int step = 0; step < p.steps; ++step) {
    uint4* slot = p.ring + static_cast<size_t>(step & 1) * total;
    const uint32_t tag = step + 1;
    if (tid < p.packets)
      ptx::store_relaxed(slot + blockIdx.x * p.packets + tid, make_uint4(tag, tag, tag, tag));
    uint32_t missing = 0;  // a bit a packet of this thread
    for (int i = 0; i < kEach; ++i) missing |= (tid + i * kThreads < total ? 1u : 0u) << i;
    wait_until([&] {
      uint4 v[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i)  // all that are missing, in flight together
        if (missing >> i & 1) v[i] = ptx::load_relaxed(slot + tid + i * kThreads);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (missing >> i & 1 && all_words(v[i], tag)) missing ^= 1u << i;
      return missing == 0;
    });
    __syncthreads();
  }
  if (tid == 0) p.cycles[blockIdx.x] = clock64() - begin;
}

void launch_gather(const Shape& shape, const Gather& p) {
  const int each = (shape.grid * p.packets + kThreads - 1) / kThreads;
  if (each <= 1) return launch(gather_step<1>, shape, p);
  if (each <= 3) return launch(gather_step<3>, shape, p);
  if (each <= 9) return launch(gather_step<9>, shape, p);
  fail("%d blocks of %d packets: more than a thread reads here", shape.grid, p.packets);
}

void measure_grid(int blocks) {
  constexpr int kSteps = 1000, kRepeats = 4;
  const Shape shape{.grid = blocks, .block = kThreads, .cooperative = true};
  Buffer<long long> cycles(blocks);
  const auto add = [&](std::vector<double>& steps) {
    for (const long long c : cycles.host()) steps.push_back(static_cast<double>(c) / kSteps);
  };
  {
    Buffer<uint32_t> counter(1);
    std::vector<double> steps;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      counter.fill(0);
      launch(counter_barrier, shape, kSteps, counter.get(), cycles.get());
      finish("counter barrier");
      if (repeat > 0) add(steps);
    }
    Figure("grid_step").with("blocks", blocks).with("form", "counter").print(steps, "cycles");
  }
  for (const int packets : {1, 4, 16}) {
    Buffer<uint4> ring(2 * static_cast<size_t>(blocks) * packets);
    std::vector<double> steps;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      ring.fill(0);
      launch_gather(shape, Gather{kSteps, packets, ring.get(), cycles.get()});
      finish("data-as-flag step");
      if (repeat > 0) add(steps);
    }
    Figure("grid_step")
        .with("blocks", blocks)
        .with("form", "data as flag")
        .with("bytes_per_block", packets * 16)
        .print(steps, "cycles");
  }
}

int main() {
  warm_up();
  measure_hop<true>("release, acquire");
  measure_hop<false>("relaxed");
  const int sms = sm_count();
  for (const int blocks : {32, 64, 96, 128})
    if (blocks < sms) measure_grid(blocks);
  measure_grid(sms);
}
