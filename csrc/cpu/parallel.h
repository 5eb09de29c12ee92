// Threads and scratch memory. Nothing here depends on the SIMD level.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rnnfast::cpu {

// Holds each of its members until all have come; what was written before is read after it.
class alignas(128) Barrier {
 public:
  void wait(int members) noexcept;

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

// One of several threads that run the same body at the same time.
struct Member {
  int index;
  int count;
  Barrier* barriers;  // `count` of them, for the body to use as it likes; null when alone
};

// Where the threads of one call come from.
struct Threads {
  int count;  // at most
  int pool;   // taken from this many that are there already; 0: new ones, each started for the call
};

// No more threads than cores that they may run on, of the `wanted` ones that torch has. A pool of
// more is left alone: all of its threads would have to come by, and a smaller team than the last
// one makes libgomp end the threads that are too many, and start them again for torch.
Threads usable_threads(int wanted);

// Runs body(context, member) on `threads` threads at once, the caller's among them, or on as many
// as can be had; count says how many. One thread never leaves the caller. Returns when all are
// done. The body must not throw: others may wait for it.
using TeamBody = void (*)(void* context, const Member& member);
void run_team(Threads threads, TeamBody body, void* context);

// Makes run_team use the threads of the libgomp that the process already runs (torch's), because a
// second pool fights the first one's spinning workers. Addresses of GOMP_parallel,
// omp_get_num_threads, omp_get_thread_num and omp_get_num_procs; zeros go back to std::thread.
struct OpenMp {
  std::uintptr_t parallel = 0;
  std::uintptr_t num_threads = 0;
  std::uintptr_t thread_num = 0;
  std::uintptr_t num_procs = 0;
};
void set_openmp(const OpenMp& runtime);

// So many cores' time the process may take (a container's quota); 0: no limit.
void set_quota(int cores);
// Takes the machine for one of so many cores, for tests; 0: asks the system.
void set_cores(int cores);

// Asks for huge pages (2 MB) inside a large block that is written next. Memory that is new to the
// process costs a fault a page, and 512 small pages take seven times as long as a huge one.
void expect_to_fill(void* data, std::size_t bytes);

// While it lives, subnormal numbers count as zero in this thread. One costs some Intel cores a
// hundred cycles, and a vanishing gradient is full of them: BPTT of a tanh layer over 257 steps
// took four times as long. float16's own subnormals, which are normal floats, stay.
class FlushSubnormals {
 public:
  FlushSubnormals() noexcept : before_(get()) { set(before_ | kFlush); }
  ~FlushSubnormals() { set(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr std::uint64_t kFlush = 0x8040;  // results, operands
  static std::uint64_t get() noexcept { return __builtin_ia32_stmxcsr(); }
  static void set(std::uint64_t x) noexcept {
    __builtin_ia32_ldmxcsr(static_cast<std::uint32_t>(x));
  }
#elif defined(__aarch64__)
  static constexpr std::uint64_t kFlush = std::uint64_t{1} << 24;
  static std::uint64_t get() noexcept {
    std::uint64_t x;
    __asm__ volatile("mrs %0, fpcr" : "=r"(x));
    return x;
  }
  static void set(std::uint64_t x) noexcept { __asm__ volatile("msr fpcr, %0" : : "r"(x)); }
#else
  static constexpr std::uint64_t kFlush = 0;
  static std::uint64_t get() noexcept { return 0; }
  static void set(std::uint64_t) noexcept {}
#endif
  std::uint64_t before_;
};

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
