// Starts a kernel: on the current device by the CUDA runtime, on the host by the emulation. what()
// names the launch, for an error message.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/device/rt.cuh"
#include "cuda/host/launch.h"

#ifndef RNNFAST_EMULATION
#include <atomic>
#endif

namespace rnnfast::cuda {

struct Grid {
  int x, y;
  int threads;
  std::size_t shared;
  int cluster;  // blocks, along x
};

#ifdef RNNFAST_EMULATION

template <auto kKernel, class Arguments, class What>
void start(const Arguments& arguments, const Grid& grid, const Stream&, What what) {
  try {
    emulation::launch({grid.x, grid.y, grid.threads, grid.cluster, grid.shared},
                      [&] { kKernel(arguments); });
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(what() + ": " + error.what());
  }
}

inline std::string why_not(const void*) { return ""; }

template <class Arguments>
int most_clusters(void (*)(Arguments), const Grid&, int) {
  return 1;
}

#else

template <class What>
void check(cudaError_t error, What what) {
  if (error != cudaSuccess) throw std::runtime_error(what() + ": " + cudaGetErrorString(error));
}

constexpr std::size_t kUsualShared = 48 << 10;  // bytes; more needs an attribute of the kernel
constexpr int kUsualCluster = 8;                // blocks; likewise

// Loads a kernel's code and sets its attributes. The first launch may be inside the capture of a
// graph, which forbids both unless the thread's capture mode is relaxed.
inline cudaError_t load(const void* kernel, const Grid& grid, cudaFuncAttributes& attributes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && grid.shared > kUsualShared) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared));
  }
  if (error == cudaSuccess && grid.cluster > kUsualCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error;
}

// A launch in the runtime's form. Not to be copied: it points into itself.
class Configured {
 public:
  Configured(const Grid& grid, std::uintptr_t stream) {
    config_.gridDim = dim3(grid.x, grid.y);
    config_.blockDim = dim3(grid.threads);
    config_.dynamicSmemBytes = grid.shared;
    config_.stream = reinterpret_cast<cudaStream_t>(stream);
    if (grid.cluster == 1) return;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute attribute_ = {};
};

// Why the device or its driver does not run the code of a kernel; "" if they do.
inline std::string why_not(const void* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = load(kernel, {}, attributes);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clears it: it is reported here, not by the next launch
  return std::string("the CUDA kernels cannot run: ") + cudaGetErrorString(error);
}

// How many clusters like this one can be resident at once; 0 if there is room for none, or if the
// device or its driver gives no answer (unusable() says why); -1 if a block is too large.
template <class Arguments>
int most_clusters(void (*kernel)(Arguments), const Grid& grid, int device) {
  const void* address = reinterpret_cast<const void*>(kernel);
  int shared = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t error =
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && grid.shared > static_cast<std::size_t>(shared)) return -1;
  if (error == cudaSuccess) error = load(address, grid, attributes);
  if (error == cudaSuccess) {
    // A newer device would run code for older ones, which has no exchange.
    if (attributes.ptxVersion < 90) return 0;
    const Configured launch(grid, 0);
    error = cudaOccupancyMaxActiveClusters(&most, address, launch.get());
  }
  if (error == cudaSuccess) return most;
  cudaGetLastError();  // clears it: the answer is 0, and the next launch has no error
  return 0;
}

template <auto kKernel, class Arguments, class What>
void start(const Arguments& arguments, const Grid& grid, const Stream& stream, What what) {
  static std::atomic<std::uint64_t> loaded{0};  // of this kernel
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  const std::uint64_t bit = std::uint64_t{1} << (stream.device % 64);
  if ((loaded.load() & bit) == 0) {  // once for each device
    cudaFuncAttributes attributes;
    check(load(kernel, grid, attributes), what);
    loaded.fetch_or(bit);
  }
  void* pointer = const_cast<Arguments*>(&arguments);
  const Configured launch(grid, stream.handle);
  // The error may come from work enqueued before.
  check(cudaLaunchKernelExC(launch.get(), kernel, &pointer), what);
}

#endif

}  // namespace rnnfast::cuda
