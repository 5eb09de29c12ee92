// Starts a kernel: on the current device by the CUDA runtime, on the host by the emulation. what()
// says what is being done, for an error.
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

constexpr std::size_t kUsualShared = 48 << 10;  // bytes; for more a kernel has to be told
constexpr int kUsualCluster = 8;                // blocks; likewise

// Loads a kernel's code, and tells it what it may have: at its first launch it could be in the
// capture of a graph, which forbids that unless it is told otherwise.
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

// A launch as the runtime has it. Not to be copied: it points into itself.
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

// Why the device or its driver does not take the code of a kernel; "" where they do.
inline std::string why_not(const void* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = load(kernel, {}, attributes);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is told, and no error of the next launch
  return std::string("the CUDA kernels cannot run: ") + cudaGetErrorString(error);
}

// How many clusters like this one the device has room for at once; 0 where it takes none, or where
// the device or its driver cannot be asked (unusable() says why), -1 where a block is too large.
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
    // Code for older devices, which a newer one would run: without the exchange.
    if (attributes.ptxVersion < 90) return 0;
    const Configured launch(grid, 0);
    error = cudaOccupancyMaxActiveClusters(&most, address, launch.get());
  }
  if (error == cudaSuccess) return most;
  cudaGetLastError();  // it is understood, and no error of the next launch
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
  // What this tells may be an error of work before it.
  check(cudaLaunchKernelExC(launch.get(), kernel, &pointer), what);
}

#endif

}  // namespace rnnfast::cuda
