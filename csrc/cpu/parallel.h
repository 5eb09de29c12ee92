// Threads and scratch memory. Nothing here depends on the SIMD level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnnfast::cpu {

// Runs body(context, task) once for every task in [0, tasks), on at most `threads` threads, the
// caller's among them; one thread or one task never leaves the caller. Returns when all are done.
// The first exception of a body is rethrown here; tasks not begun by then are dropped.
using TaskBody = void (*)(void* context, std::int64_t task);
void parallel_for(std::int64_t tasks, int threads, TaskBody body, void* context);

// Makes parallel_for use the libgomp that the process already runs (torch's), because a second
// pool fights the first one's spinning workers. The address of GOMP_parallel; 0 goes back to
// std::thread.
void set_openmp(std::uintptr_t gomp_parallel);

// Uninitialised memory for one kernel call, aligned to 128 bytes. Small blocks are kept per thread
// for the next call: a call with T = B = H = 1 takes a microsecond.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  bool kept_;
};

}  // namespace rnnfast::cpu
