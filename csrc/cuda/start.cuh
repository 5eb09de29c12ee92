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

// Loads a kernel's code: at its first launch it could be in the capture of a graph, which forbids
// that unless it is told otherwise.
inline void load(const void* kernel, const std::string& what) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), what);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  cudaThreadExchangeStreamCaptureMode(&mode);
  check(error, what);
}

// Why the device or its driver does not take the code of a kernel; "" where they do.
inline std::string why_not(const void* kernel, int device) {
  const std::string what = "the CUDA kernels cannot run";
  try {
    const OnDevice on_device(device, what);
    load(kernel, what);
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // it is told, and no error of the next launch
    return error.what();
  }
  return "";
}

template <class Arguments>
void start(void (*kernel)(Arguments), const Arguments& arguments, const Grid& grid,
           const Stream& stream, const std::string& what, std::atomic<std::uint64_t>& loaded) {
  const OnDevice on_device(stream.device, what);
  const std::uint64_t bit = std::uint64_t{1} << (stream.device % 64);
  if ((loaded.load() & bit) == 0) {  // once for each device
    load(reinterpret_cast<const void*>(kernel), what);
    loaded.fetch_or(bit);
  }
  void* pointer = const_cast<Arguments*>(&arguments);
  // What this tells may be an error of work before it.
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y), grid.threads,
                         &pointer, grid.shared, reinterpret_cast<cudaStream_t>(stream.handle)),
        what);
}

#endif

}  // namespace rnnfast::cuda
