// Question 2: what does one all-to-all exchange by st.async cost, and how many bytes a clock can
// one SM take in? Each block of a cluster sends its slice to every block (itself too, as the
// recurrent kernel does) and goes on when all slices have come: the kernel's step without its work.
#include "probe.cuh"

constexpr int kThreads = 256;

struct Exchange {
  int bytes;             // what each block takes in a step
  int steps;             // at least 2
  long long* cycles;     // [grid] for all steps
  unsigned int* errors;  // [grid] wrong words after the last two steps
};

__device__ __forceinline__ uint32_t expected_word(int step, uint32_t rank, int index) {
  return static_cast<uint32_t>(step) << 20 ^ rank << 16 ^ static_cast<uint32_t>(index);
}

// Two buffers, one mbarrier each. A block sends step s + 1 only after it took in all of step s, so
// nothing can overtake by two steps and reach a buffer whose phase is still open.
template <int kCluster, int kWords>
__global__ void __launch_bounds__(kThreads, 1) exchange(Exchange p) {
  DYNAMIC_SHARED(shared);
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t full = base + 2 * p.bytes;  // two mbarriers behind the two buffers
  const uint32_t rank = ptx::cluster_rank();
  const int slice = p.bytes / kCluster;           // bytes
  const int messages = slice / (4 * kWords);      // to each block, a step
  const int tid = static_cast<int>(threadIdx.x);  // thread 0 always has a message
  if (tid == 0) {
    for (int b = 0; b < 2; ++b) {
      ptx::barrier_init(full + 8 * b, 1);
      ptx::barrier_expect(full + 8 * b, p.bytes);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_barrier();  // every mbarrier is ready before the first message

  const long long begin = clock64();
  // A thread without a message does not wait either: nothing would keep a phase open for it.
  for (int step = 0; tid < messages && step < p.steps; ++step) {
    const int buffer = step & 1;
    for (int m = tid; m < messages; m += kThreads) {
      uint32_t message[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) message[w] = expected_word(step, rank, m * kWords + w);
      const uint32_t to = base + buffer * p.bytes + rank * slice + m * 4 * kWords;
#pragma unroll
      // In the order of csrc/cuda/resident/exchange_cluster.cuh: one block at a time sends to a
      // block.
      for (uint32_t c = 0; c < kCluster; ++c) {
        const uint32_t peer = rank ^ c;
        ptx::store_async(ptx::map_to_rank(to, peer), message,
                         ptx::map_to_rank(full + 8 * buffer, peer));
      }
    }
    const auto arrived = [&] {
      return ptx::barrier_try_wait<ptx::Acquire::kCta>(full + 8 * buffer, step >> 1 & 1);
    };
    if (!wait_until(arrived)) break;
    if (tid == 0) ptx::barrier_expect(full + 8 * buffer, p.bytes);
  }
  if (tid == 0) p.cycles[blockIdx.x] = clock64() - begin;

  __syncthreads();
  ptx::cluster_barrier();  // all messages have arrived everywhere, and nobody sends any more
  if (tid == 0) p.errors[blockIdx.x] = 0;
  __syncthreads();
  for (int step = p.steps - 2; step < p.steps; ++step)
    for (int i = tid; i < p.bytes / 4; i += kThreads) {
      const uint32_t* buffer = reinterpret_cast<const uint32_t*>(shared + (step & 1) * p.bytes);
      const uint32_t source = i / (slice / 4);
      if (buffer[i] != expected_word(step, source, i % (slice / 4)))
        atomicAdd(&p.errors[blockIdx.x], 1u);
    }
}

template <int kCluster, int kWords>
void measure(const char* width) {
  constexpr int kSteps = 2000, kRepeats = 5, kLargest = 64 << 10;
  // The same footprint for every payload: one block an SM, so that `all` means the whole chip.
  Shape shape{.grid = 0,
              .block = kThreads,
              .cluster = kCluster,
              .shared = 2 * kLargest + 2 * sizeof(uint64_t)};
  const int most = max_active_clusters(exchange<kCluster, kWords>, shape);
  if (most < 1) fail("no cluster of %d blocks fits on this device", kCluster);
  for (const bool alone : {true, false}) {
    shape.grid = (alone ? 1 : most) * kCluster;
    Buffer<long long> cycles(shape.grid);
    Buffer<unsigned int> errors(shape.grid);
    const auto tag = [&](const char* name) {
      return Figure(name)
          .with("cluster", kCluster)
          .with("width", width)
          .with("clusters", alone ? "one" : "all");
    };
    double small = 0, large = 0;  // cycles a step at 16 KB and 64 KB
    for (int bytes = 512; bytes <= kLargest; bytes *= 2) {
      std::vector<double> steps;
      for (int repeat = 0; repeat < kRepeats; ++repeat) {
        cycles.fill(0xff);
        errors.fill(0xff);
        launch(exchange<kCluster, kWords>, shape,
               Exchange{bytes, kSteps, cycles.get(), errors.get()});
        finish("all-to-all exchange");
        for (const unsigned int wrong : errors.host())
          if (wrong) {
            problems.add("%s, %d bytes: %u words of a block arrived wrong", width, bytes, wrong);
            return;
          }
        if (repeat > 0)
          for (const long long c : cycles.host()) steps.push_back(static_cast<double>(c) / kSteps);
      }
      tag("exchange_step").with("bytes", bytes).print(steps, "cycles");
      if (bytes == 16 << 10) small = median(steps);
      if (bytes == 64 << 10) large = median(steps);
    }
    const double rate = (48 << 10) / (large - small);
    tag("dsmem_ingress").print(rate, "B/clk/SM");
    tag("dsmem_ingress_remote").print(rate * (kCluster - 1) / kCluster, "B/clk/SM");
  }
}

template <int kCluster>
void measure_widths() {
  measure<kCluster, 1>("b32");
  measure<kCluster, 2>("v2.b32");
  measure<kCluster, 4>("v4.b32");
}

int main(int argc, char** argv) {
  const int cluster = argument(argc, argv, 1, "cluster", {2, 4, 8, 16});
  warm_up();
  if (cluster == 2) measure_widths<2>();
  if (cluster == 4) measure_widths<4>();
  if (cluster == 8) measure_widths<8>();
  if (cluster == 16) measure_widths<16>();
  return problems.exit_status();
}
