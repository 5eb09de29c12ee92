// Shared by all probes: checked CUDA calls, bounded spins, launches, and figures printed one
// JSON object a line. A probe exits 0 when everything it set out to measure was measured.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "ptx.cuh"

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// --- device: waits that end ----------------------------------------------------------------------

constexpr long long kWaitCycles = 1'000'000'000;  // about half a second; then a wait gives up
constexpr int kPollsPerLook = 256;  // at clock and flag: rarer than any wait that goes well

// Set by the first wait that gives up, so that the others follow soon; the host reads it.
static __device__ unsigned int device_gave_up = 0;

// Polls ready() until it says true; false if it gave up.
template <class F>
__device__ __forceinline__ bool wait_until(F ready) {
  long long begin = 0;
  for (int polls = 1; !ready(); ++polls)
    if (polls % kPollsPerLook == 0) {
      if (begin == 0) begin = clock64();
      if (clock64() - begin > kWaitCycles) atomicExch(&device_gave_up, 1u);
      if (*static_cast<volatile unsigned int*>(&device_gave_up) != 0) return false;
    }
  return true;
}

// --- host: errors --------------------------------------------------------------------------------

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::fflush(stdout);  // the figures so far come first
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::exit(1);
}

#define CHECK(call)                                                                \
  do {                                                                             \
    const cudaError_t error = (call);                                              \
    if (error != cudaSuccess)                                                      \
      fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
  } while (0)

// Waits for the device; fails on an error and on a kernel that gave up waiting.
inline void finish(const char* what) {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) fail("%s: %s", what, cudaGetErrorString(error));
  unsigned int gave_up = 0;
  CHECK(cudaMemcpyFromSymbol(&gave_up, device_gave_up, sizeof gave_up));
  if (gave_up) fail("%s: a wait gave up after %lld cycles", what, kWaitCycles);
}

// Problems that do not end the probe. `return problems.exit_status()` is main's last line.
class Problems {
 public:
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    ++count_;
    std::va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
  }
  int exit_status() const { return count_ ? 1 : 0; }

 private:
  int count_ = 0;
};
inline Problems problems;

// The positional argument `index`, which must be one of `allowed`.
inline int argument(int argc, char** argv, int index, const char* name,
                    const std::vector<int>& allowed) {
  const int value = index < argc ? std::atoi(argv[index]) : -1;
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return value;
  std::string wanted;
  for (int a : allowed) wanted += (wanted.empty() ? "" : ", ") + std::to_string(a);
  fail("argument %s: given %s, wanted one of %s", name, index < argc ? argv[index] : "nothing",
       wanted.c_str());
}

// --- host: figures -------------------------------------------------------------------------------

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

// Figure("name").with("cluster", 8).print(value, "cycles");
class Figure {
 public:
  explicit Figure(const char* name) : name_(name) {}
  Figure& with(const char* key, int value) { return add(key, std::to_string(value)); }
  Figure& with(const char* key, const char* value) {
    return add(key, std::string("\"").append(value).append("\""));
  }
  void print(double value, const char* unit) const { print(number(value), unit); }
  // The median, with the smallest and the largest of them.
  void print(const std::vector<double>& samples, const char* unit) const {
    const auto [low, high] = std::minmax_element(samples.begin(), samples.end());
    print(number(median(samples)) + ", \"low\": " + number(*low) + ", \"high\": " + number(*high),
          unit);
  }

 private:
  void print(const std::string& value, const char* unit) const {
    std::printf("{\"figure\": \"%s\", \"params\": {%s}, \"value\": %s, \"unit\": \"%s\"}\n",
                name_.c_str(), params_.c_str(), value.c_str(), unit);
    std::fflush(stdout);  // a probe that is killed later keeps what it has measured
  }
  Figure& add(const char* key, const std::string& json) {
    params_.append(params_.empty() ? "\"" : ", \"").append(key).append("\": ").append(json);
    return *this;
  }
  std::string number(double value) const {
    if (!std::isfinite(value)) fail("figure %s: %g is not a measurement", name_.c_str(), value);
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    return text;
  }
  std::string name_, params_;
};

// --- host: memory, launches, time ----------------------------------------------------------------

template <class T>
class Buffer {  // device memory; starts as all ones (NaN, impossible flags), never as zeros
 public:
  explicit Buffer(size_t size) : size_(size) {
    CHECK(cudaMalloc(&data_, size * sizeof(T)));
    fill(0xff);
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    CHECK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  void fill(int byte) { CHECK(cudaMemset(data_, byte, size_ * sizeof(T))); }
  std::vector<T> host() const { return host(0, size_); }
  std::vector<T> host(size_t begin, size_t count) const {
    std::vector<T> v(count);
    CHECK(cudaMemcpy(v.data(), data_ + begin, count * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
  T* get() { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Shared memory that leaves room for one block an SM, whatever else it holds.
constexpr size_t kWholeSm = 116 << 10;

struct Shape {
  int grid, block;
  int cluster = 0;  // blocks in a cluster; 0 for a kernel that knows no clusters
  size_t shared = 0;
  bool cooperative = false;
};

// cudaLaunchConfig_t keeps pointers to its attributes: one object holds both.
class LaunchConfig {
 public:
  explicit LaunchConfig(const Shape& shape) {
    config_.gridDim = shape.grid;
    config_.blockDim = shape.block;
    config_.dynamicSmemBytes = shape.shared;
    config_.attrs = attributes_;
    if (shape.cluster > 0) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes_[config_.numAttrs].val.clusterDim.x = shape.cluster;
      attributes_[config_.numAttrs].val.clusterDim.y = 1;
      attributes_[config_.numAttrs++].val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes_[config_.numAttrs++].val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* operator&() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

template <class... P>
void allow(void (*kernel)(P...), const Shape& shape) {
  const void* f = reinterpret_cast<const void*>(kernel);
  CHECK(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared)));
  if (shape.cluster > 8)
    CHECK(cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Shape& shape, A&&... arguments) {
  allow(kernel, shape);
  const LaunchConfig config(shape);
  CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

// How many clusters of this shape the driver says can be resident at once; 0, and a problem, when
// it refuses the shape.
template <class... P>
int max_active_clusters(void (*kernel)(P...), Shape shape) {
  shape.grid = shape.cluster;
  allow(kernel, shape);
  const LaunchConfig config(shape);
  int clusters = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &config);
  if (error == cudaSuccess) return clusters;
  problems.add("clusters of %d: %s", shape.cluster, cudaGetErrorString(error));
  cudaGetLastError();  // seen; what follows is not its fault
  return 0;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, attribute, 0));
  return value;
}

inline int sm_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

static __global__ void spin_cycles(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}

// Milliseconds on the device between the start and the end of what `work` enqueues. The device is
// kept busy meanwhile, so that the host's time to issue the work is not measured with it.
template <class F>
double device_ms(F&& work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  spin_cycles<<<1, 32>>>(400'000);
  CHECK(cudaEventRecord(begin));
  work();
  CHECK(cudaEventRecord(end));
  CHECK(cudaEventSynchronize(end));
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, begin, end));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return ms;
}

// Brings the clocks up (an idle GPU runs at a sixth of them) and prints what they came to.
inline void warm_up() {
  constexpr long long kCycles = 50'000'000;
  const Shape shape{.grid = sm_count(), .block = 32};
  double mhz = 0;
  for (int i = 0; i < 4; ++i) {
    const double ms = device_ms([&] { launch(spin_cycles, shape, kCycles); });
    mhz = std::max(mhz, static_cast<double>(kCycles) / ms / 1e3);
  }
  finish("warm-up");
  Figure("sm_clock").print(mhz, "MHz");
}
