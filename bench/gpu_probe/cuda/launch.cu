// Question 6, the part without a matrix product: copy bandwidth, what a launch costs, what a node
// of a CUDA graph costs. (The matrix products are torch's: see ../peers.py.)
#include <chrono>

#include "probe.cuh"

__global__ void nothing() {}

// A counter-based hash: random data, so that no power is saved on zeros.
__global__ void randomize(uint4* data, size_t size) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b9u;
    const auto next = [&] {
      h = (h ^ h >> 16) * 0x85ebca6bu;
      h = (h ^ h >> 13) * 0xc2b2ae35u;
      return h ^= h >> 16;
    };
    data[i] = make_uint4(next(), next(), next(), next());
  }
}

double wall_us() {
  using namespace std::chrono;
  return duration<double, std::micro>(steady_clock::now().time_since_epoch()).count();
}

void measure_copy() {
  constexpr size_t kBytes = size_t{4} << 30;  // many times the L2
  Buffer<uint4> from(kBytes / 16), to(kBytes / 16);
  launch(randomize, {.grid = 8 * sm_count(), .block = 256}, from.get(), kBytes / 16);
  finish("random data");
  std::vector<double> rates;
  for (int repeat = 0; repeat < 8; ++repeat) {
    const double ms = device_ms(
        [&] { CHECK(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice)); });
    if (repeat > 2) rates.push_back(2.0 * kBytes / ms / 1e9);
  }
  Figure("copy").with("how", "device to device, read + written").print(rates, "TB/s");
}

void measure_launches() {
  constexpr int kLaunches = 500;  // fewer than the queue holds
  std::vector<double> issue, stream, alone;
  for (int repeat = 0; repeat < 6; ++repeat) {
    const double begin = wall_us();
    double issued = 0;
    const double ms = device_ms([&] {
      for (int i = 0; i < kLaunches; ++i) nothing<<<1, 32>>>();
      issued = wall_us();
    });
    finish("empty launches");
    if (repeat == 0) continue;
    issue.push_back((issued - begin) / kLaunches);
    stream.push_back(ms * 1e3 / kLaunches);
  }
  for (int i = 0; i < 300; ++i) {
    const double begin = wall_us();
    nothing<<<1, 32>>>();
    CHECK(cudaDeviceSynchronize());
    if (i >= 100) alone.push_back(wall_us() - begin);
  }
  Figure("launch").with("what", "the host's time to issue one").print(issue, "us");
  Figure("launch").with("what", "one after the other in a stream").print(stream, "us");
  Figure("launch").with("what", "one, and wait for it").print(alone, "us");
}

void measure_graph() {
  constexpr int kNodes = 1000;
  cudaStream_t side;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
  CHECK(cudaStreamBeginCapture(side, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kNodes; ++i) nothing<<<1, 32, 0, side>>>();
  CHECK(cudaStreamEndCapture(side, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> node;
  for (int repeat = 0; repeat < 12; ++repeat) {
    const double ms = device_ms([&] { CHECK(cudaGraphLaunch(executable, nullptr)); });
    finish("graph");
    if (repeat > 1) node.push_back(ms * 1e3 / kNodes);
  }
  Figure("graph_node").with("nodes", kNodes).print(node, "us");
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(side));
}

int main() {
  warm_up();
  measure_copy();
  measure_launches();
  measure_graph();
}
