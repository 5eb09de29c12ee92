#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

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

struct Region {
  TeamBody body;
  void* context;
  Barrier* barriers;
};

void work_in_openmp(void* data) {
  const Region& region = *static_cast<const Region*>(data);
  // libgomp gives fewer threads than asked for where it must: one inside another region.
  const int index = reinterpret_cast<OmpQuery>(openmp.thread_num)();
  const int count = reinterpret_cast<OmpQuery>(openmp.num_threads)();
  region.body(region.context, {index, count, region.barriers});
}

void run_on_new_threads(const Region& region, int threads) {
  std::atomic<int> count{0};  // until it is known how many there are, none begins
  const auto work = [&region, &count](int index) {
    while (count.load(std::memory_order_acquire) == 0) std::this_thread::yield();
    region.body(region.context, {index, count.load(std::memory_order_relaxed), region.barriers});
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, i);
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

void run_team(int threads, TeamBody body, void* context) {
  if (threads <= 1) return body(context, {0, 1, nullptr});
  std::vector<Barrier> barriers(static_cast<std::size_t>(threads));
  Region region = {body, context, barriers.data()};
  if (openmp.parallel != 0) {
    reinterpret_cast<GompParallel>(openmp.parallel)(work_in_openmp, &region,
                                                    static_cast<unsigned>(threads), 0);
  } else {
    run_on_new_threads(region, threads);
  }
}

void set_openmp(const OpenMp& runtime) { openmp = runtime; }

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
