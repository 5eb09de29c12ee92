// Starts a kernel: on the device by the CUDA runtime, on the host by the emulation.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "rt.cuh"

#ifndef RNNFAST_EMULATION
#include <atomic>
#endif

namespace rnnfast::cuda {

struct Grid {
  int x, y;
  int threads;
  std::size_t shared;
};

#ifdef RNNFAST_EMULATION

template <class Arguments>
void start(void (*kernel)(Arguments), const Arguments& arguments, const Grid& grid, const Stream&,
           const std::string& what) {
  try {
    emulation::launch({grid.x, grid.y, grid.threads, 1, grid.shared}, [&] { kernel(arguments); });
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(what + ": " + error.what());
  }
}

inline std::string why_not(const void*, int) { return ""; }

#else

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// The current device of the thread, while it lives.
class OnDevice {
 public:
  OnDevice(int device, const std::string& what) {
    check(cudaGetDevice(&before_), what);
    if (device != before_) check(cudaSetDevice(device), what);
    moved_ = device != before_;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Whether the device and its driver take the code of a kernel.
inline std::string why_not(const void* kernel, int device) {
  try {
    const OnDevice on_device(device, "the CUDA kernels cannot run");
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "the CUDA kernels cannot run");
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // it is told, and no error of the next launch
    return error.what();
  }
  return "";
}

// Loads the kernel's code, once for each device: at its first launch it could be in the capture of
// a graph, which forbids that unless it is told otherwise.
inline void load(const void* kernel, std::atomic<std::uint64_t>& loaded, int device,
                 const std::string& what) {
  const std::uint64_t bit = std::uint64_t{1} << (device % 64);
  if (loaded.load() & bit) return;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), what);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  cudaThreadExchangeStreamCaptureMode(&mode);
  check(error, what);
  loaded.fetch_or(bit);
}

template <class Arguments>
void start(void (*kernel)(Arguments), const Arguments& arguments, const Grid& grid,
           const Stream& stream, const std::string& what, std::atomic<std::uint64_t>& loaded) {
  const OnDevice on_device(stream.device, what);
  load(reinterpret_cast<const void*>(kernel), loaded, stream.device, what);
  void* pointer = const_cast<Arguments*>(&arguments);
  // What this tells may be an error of work before it.
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y), grid.threads,
                         &pointer, grid.shared, reinterpret_cast<cudaStream_t>(stream.handle)),
        what);
}

#endif

}  // namespace rnnfast::cuda
