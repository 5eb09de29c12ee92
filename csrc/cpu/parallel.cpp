#include "parallel.h"

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

namespace rnnfast::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpQuery = int (*)();

// Written while the module is set up, before any kernel runs in another thread.
OpenMp openmp;
std::atomic<int> quota{0};
std::atomic<int> supposed_cores{0};

// That this thread may run on, and with it those that it starts.
int cores_of_thread() {
#ifdef __linux__
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) return CPU_COUNT(&mask);
#endif
  const unsigned cores = std::thread::hardware_concurrency();  // 0 where nobody knows
  return cores > 0 ? static_cast<int>(cores) : 1;
}

// That libgomp's threads may run on: where it binds each to a core of its own (OMP_PROC_BIND), they
// are more than those of this thread.
int cores_of_pool() {
  if (openmp.num_procs == 0) return cores_of_thread();
  return reinterpret_cast<OmpQuery>(openmp.num_procs)();
}

struct Region {
  TeamBody body;
  void* context;
  Barrier* barriers;
  int threads;  // of the pool's, which may be more
};

void work_in_openmp(void* data) {
  const Region& region = *static_cast<const Region*>(data);
  // libgomp gives fewer threads than asked for where it must: one inside another region.
  const int index = reinterpret_cast<OmpQuery>(openmp.thread_num)();
  const int count = std::min(reinterpret_cast<OmpQuery>(openmp.num_threads)(), region.threads);
  if (index < count) region.body(region.context, {index, count, region.barriers});
}

void run_on_new_threads(const Region& region) {
  std::atomic<int> count{0};  // until it is known how many there are, none begins
  const auto work = [&region, &count](int index) {
    while (count.load(std::memory_order_acquire) == 0) std::this_thread::yield();
    region.body(region.context, {index, count.load(std::memory_order_relaxed), region.barriers});
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(region.threads - 1));
  try {
    for (int i = 1; i < region.threads; ++i) helpers.emplace_back(work, i);
  } catch (...) {
    // No more threads to be had, or no memory: those that started, and the caller, are the team.
  }
  count.store(static_cast<int>(helpers.size()) + 1, std::memory_order_release);
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

constexpr int kSpins = 4000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

constexpr std::size_t kAlignment = 128;
constexpr std::size_t kMostKept = std::size_t{4} << 20;

struct KeptBlock {
  char* data = nullptr;
  std::size_t bytes = 0;
  bool busy = false;
  ~KeptBlock() { release(); }
  void release() {
    ::operator delete(data, std::align_val_t(kAlignment));
    data = nullptr;
    bytes = 0;
  }
};

thread_local KeptBlock kept_block;

char* allocate(std::size_t bytes) {
  return static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment)));
}

}  // namespace

void Barrier::wait(int members) noexcept {
  if (members <= 1) return;
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
    arrived_.store(0, std::memory_order_relaxed);  // nobody comes again before the phase changes
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  // A step takes microseconds, so spin; but where threads outnumber cores the last one may be
  // waiting for this core.
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins > kSpins) {
      std::this_thread::yield();
    } else {
      relax();
    }
  }
}

Threads usable_threads(int wanted) {
  const int supposed = supposed_cores.load(std::memory_order_relaxed);
  const auto most = [&](int (*cores)()) {
    const int there = supposed > 0 ? supposed : cores();
    const int allowed = quota.load(std::memory_order_relaxed);
    return allowed > 0 ? std::min(there, allowed) : there;
  };
  if (openmp.parallel != 0 && wanted <= most(cores_of_pool)) return {wanted, wanted};
  return {std::min(wanted, most(cores_of_thread)), 0};
}

void run_team(Threads threads, TeamBody body, void* context) {
  if (threads.count <= 1) return body(context, {0, 1, nullptr});
  std::vector<Barrier> barriers(static_cast<std::size_t>(threads.count));
  Region region = {body, context, barriers.data(), threads.count};
  if (threads.pool == 0) return run_on_new_threads(region);
  reinterpret_cast<GompParallel>(openmp.parallel)(work_in_openmp, &region,
                                                  static_cast<unsigned>(threads.pool), 0);
}

void set_openmp(const OpenMp& runtime) { openmp = runtime; }
void set_quota(int cores) { quota.store(cores, std::memory_order_relaxed); }
void set_cores(int cores) { supposed_cores.store(cores, std::memory_order_relaxed); }

void expect_to_fill([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  if (data != nullptr && first < end)
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // or it is not to be had
#endif
}

Scratch::Scratch(std::size_t bytes) : data_(nullptr), kept_(false) {
  if (bytes > kMostKept || kept_block.busy) {
    data_ = allocate(bytes);
    expect_to_fill(data_, bytes);
    return;
  }
  if (kept_block.bytes < bytes) {
    kept_block.release();
    kept_block.data = allocate(bytes);
    kept_block.bytes = bytes;
  }
  kept_block.busy = true;
  kept_ = true;
  data_ = kept_block.data;
}

Scratch::~Scratch() {
  if (kept_) {
    kept_block.busy = false;
  } else {
    ::operator delete(data_, std::align_val_t(kAlignment));
  }
}

}  // namespace rnnfast::cpu
