#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace rnnfast::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<std::uintptr_t> gomp_parallel_address{0};

// One call of parallel_for. Tasks are claimed from a counter, so that it does not matter how many
// threads the runtime really gives (libgomp gives one inside another parallel region).
struct Region {
  std::int64_t tasks;
  TaskBody body;
  void* context;
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
};

void work(void* data) {
  Region& region = *static_cast<Region*>(data);
  try {
    for (;;) {
      const std::int64_t task = region.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= region.tasks) return;
      region.body(region.context, task);
    }
  } catch (...) {  // must not unwind through libgomp
    region.next.store(region.tasks, std::memory_order_relaxed);
    const std::lock_guard<std::mutex> lock(region.mutex);
    if (!region.error) region.error = std::current_exception();
  }
}

void run_on_new_threads(Region& region, int threads) {
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &region);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and the caller, do all tasks.
  }
  work(&region);
  for (std::thread& helper : helpers) helper.join();
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

void parallel_for(std::int64_t tasks, int threads, TaskBody body, void* context) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  if (threads <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  Region region{tasks, body, context, {}, {}, {}};
  const std::uintptr_t address = gomp_parallel_address.load(std::memory_order_acquire);
  if (address != 0) {
    reinterpret_cast<GompParallel>(address)(work, &region, static_cast<unsigned>(threads), 0);
  } else {
    run_on_new_threads(region, threads);
  }
  if (region.error) std::rethrow_exception(region.error);
}

void set_openmp(std::uintptr_t gomp_parallel) {
  gomp_parallel_address.store(gomp_parallel, std::memory_order_release);
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
