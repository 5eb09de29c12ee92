// The kernels as plain functions: on a stream of the current device, without waiting for it. An
// error throws std::runtime_error with the kernel's name and its plan.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/host/plan.h"
#include "cuda/problem.h"

namespace rnnfast::cuda {

// The ordinal of the current device and one of its cudaStream_t.
struct Stream {
  int device = 0;
  std::uintptr_t handle = 0;
};

// Defined by forward.cu, backward.cu and streaming.cu, compiled once for each mode (and family).
#define RNNFAST_DECLARE(family)                               \
  namespace family {                                          \
  void forward(const Plan&, const Forward&, const Stream&);   \
  void backward(const Plan&, const Backward&, const Stream&); \
  }
#define RNNFAST_DECLARE_MODE(mode)      \
  namespace mode {                      \
  RNNFAST_DECLARE(single_block)         \
  RNNFAST_DECLARE(cluster)              \
  RNNFAST_DECLARE(streaming)            \
  namespace cluster {                   \
  int clusters(int device, int blocks); \
  }                                     \
  }
RNNFAST_DECLARE_MODE(bfloat16)
RNNFAST_DECLARE_MODE(float16)
RNNFAST_DECLARE_MODE(tf32)
RNNFAST_DECLARE_MODE(exact)
#undef RNNFAST_DECLARE_MODE
#undef RNNFAST_DECLARE

#define RNNFAST_TEXT(word) #word
#define RNNFAST_NAME(word) RNNFAST_TEXT(word)

void forward(const Plan& plan, const Forward& problem, const Stream& stream);
void backward(const Plan& plan, const Backward& problem, const Stream& stream);

// The record of a backward pass that has left c.
void measure(const Plan& plan, const Measured& problem, const Stream& stream);

// How many clusters of `blocks` blocks can be resident at once; 0 if the device has no clusters, or
// the build no code for them.
int clusters(Mode mode, int device, int blocks);

// Why no kernel of this build runs on the current device (its code, the driver); "" if they run.
std::string unusable();

// Kernels of this build, by name.
std::vector<std::string> kernels();

}  // namespace rnnfast::cuda
