// Question 3: how many clusters of each size are resident at once? What the driver says, and what
// happens when three times as many are launched and each holds its SMs for a while.
#include <set>

#include "probe.cuh"

constexpr int kThreads = 256;
constexpr size_t kShared = 200 << 10;  // one block an SM

struct Hold {
  long long cycles;
  int* running;  // [1] clusters that are resident
  int* peak;     // [1] most of them ever
  int* sm;       // [grid] where each block ran
};

__global__ void __launch_bounds__(kThreads, 1) hold(Hold p) {
  const bool leads = ptx::cluster_rank() == 0 && threadIdx.x == 0;
  if (leads) atomicMax(p.peak, atomicAdd(p.running, 1) + 1);
  if (threadIdx.x == 0) p.sm[blockIdx.x] = static_cast<int>(ptx::sm_id());
  const long long begin = clock64();
  while (clock64() - begin < p.cycles) {
  }
  ptx::cluster_barrier();  // the whole cluster is still here when it is counted out
  if (leads) atomicSub(p.running, 1);
}

int main() {
  warm_up();
  for (const int cluster : {1, 2, 4, 8, 12, 16}) {
    Shape shape{.grid = 0, .block = kThreads, .cluster = cluster, .shared = kShared};
    const int expected = max_active_clusters(hold, shape);
    Figure("active_clusters")
        .with("cluster", cluster)
        .with("how", "occupancy query")
        .print(expected, "clusters");
    if (expected == 0) continue;  // this chip has no cluster of that size
    shape.grid = 3 * expected * cluster;
    Buffer<int> running(1), peak(1), sm(shape.grid);
    running.fill(0);
    peak.fill(0);
    launch(hold, shape, Hold{2'000'000, running.get(), peak.get(), sm.get()});
    finish("hold");
    const auto where = sm.host();
    Figure("active_clusters")
        .with("cluster", cluster)
        .with("how", "observed")
        .print(peak.host()[0], "clusters");
    Figure("sms_used")
        .with("cluster", cluster)
        .print(static_cast<double>(std::set<int>(where.begin(), where.end()).size()), "SMs");
  }
  return problems.exit_status();
}
