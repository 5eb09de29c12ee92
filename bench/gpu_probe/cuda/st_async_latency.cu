// Question 1: how long from an st.async to the return of the waiting try_wait in another block?
// Two blocks of one cluster pass a message to and fro; one hop is half a round trip.
#include "probe.cuh"

struct PingPong {
  uint32_t peer;         // block 0 plays against this rank
  int rounds;            // round trips
  long long* cycles;     // [1] for all rounds, by the clock of block 0
  unsigned int* errors;  // [2] wrong words in the last message that each player got
  unsigned int* sm;      // [2] where the players ran
};

template <int kWords, ptx::Acquire kAcquire>
__global__ void ping_pong(PingPong p) {
  DYNAMIC_SHARED(shared);
  auto* box = reinterpret_cast<uint32_t*>(shared);  // [4], written by the other player only
  const uint32_t box_here = ptx::shared_address(box), barrier_here = box_here + 16;
  const uint32_t rank = ptx::cluster_rank(), other = rank == 0 ? p.peer : 0u;
  const bool plays = threadIdx.x == 0 && (rank == 0 || rank == p.peer);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier_here, 1);
    ptx::fence_barrier_init();
    ptx::barrier_expect(barrier_here, kWords * 4);
  }
  ptx::cluster_barrier();  // every mbarrier is ready before the first message
  if (plays) {
    const uint32_t box_there = ptx::map_to_rank(box_here, other);
    const uint32_t barrier_there = ptx::map_to_rank(barrier_here, other);
    const auto send = [&](int round) {
      uint32_t message[kWords];
      for (int w = 0; w < kWords; ++w) message[w] = static_cast<uint32_t>(round * 4 + w);
      ptx::store_async(box_there, message, barrier_there);
    };
    const long long begin = clock64();
    if (rank == 0) send(0);
    for (int round = 0; round < p.rounds; ++round) {
      const auto arrived = [&] { return ptx::barrier_try_wait<kAcquire>(barrier_here, round & 1); };
      if (!wait_until(arrived)) break;
      if (rank != 0) {
        send(round);
      } else if (round + 1 < p.rounds) {
        send(round + 1);
      }
      // After the send, so off the path; the next message cannot complete the phase before it,
      // because a phase also needs this arrival.
      ptx::barrier_expect(barrier_here, kWords * 4);
    }
    if (rank == 0) *p.cycles = clock64() - begin;
    unsigned int wrong = 0;
    for (int w = 0; w < kWords; ++w)
      wrong += box[w] != static_cast<uint32_t>((p.rounds - 1) * 4 + w);
    p.errors[rank == 0 ? 0 : 1] = wrong;
    p.sm[rank == 0 ? 0 : 1] = ptx::sm_id();
  }
  __syncwarp();
  ptx::cluster_barrier();  // nobody leaves while a message to it may be under way
}

template <int kWords, ptx::Acquire kAcquire>
void measure(int cluster, const char* width, const char* wait) {
  constexpr int kRounds = 2000, kRepeats = 5;
  Buffer<long long> cycles(1);
  Buffer<unsigned int> errors(2), sm(2);
  const Shape shape{.grid = cluster, .block = 32, .cluster = cluster, .shared = kWholeSm};
  std::vector<double> hops;
  for (int peer = 1; peer < cluster; ++peer)
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      errors.fill(0xff);
      launch(ping_pong<kWords, kAcquire>, shape,
             PingPong{static_cast<uint32_t>(peer), kRounds, cycles.get(), errors.get(), sm.get()});
      finish("st.async ping-pong");
      const auto wrong = errors.host(), where = sm.host();
      if (wrong[0] || wrong[1]) {
        problems.add("st.async %s, %s: the last message arrived wrong", width, wait);
        return;
      }
      if (where[0] == where[1]) fail("both players ran on SM %u", where[0]);
      if (repeat > 0)  // the first one warms up the code
        hops.push_back(static_cast<double>(cycles.host()[0]) / kRounds / 2);
    }
  Figure("st_async_hop")
      .with("cluster", cluster)
      .with("width", width)
      .with("wait", wait)
      .print(hops, "cycles");
}

template <int kWords>
void measure_waits(int cluster, const char* width) {
  measure<kWords, ptx::Acquire::kCta>(cluster, width, "default");
  measure<kWords, ptx::Acquire::kCluster>(cluster, width, "acquire.cluster");
}

int main(int argc, char** argv) {
  const int cluster = argument(argc, argv, 1, "cluster", {2, 4, 8, 16});
  warm_up();
  measure_waits<1>(cluster, "b32");
  measure_waits<2>(cluster, "v2.b32");
  measure_waits<4>(cluster, "v4.b32");
  return problems.exit_status();
}
