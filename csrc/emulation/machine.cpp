#include "machine.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <thread>

#ifndef RNNFAST_EMULATION_THREADS
#include <ucontext.h>

#include <csetjmp>
#endif

namespace rnnfast::emulation {
namespace {

constexpr std::size_t kBorder = 256;  // bytes around shared memory that nobody may touch
constexpr unsigned char kBorderByte = 0xa5;
constexpr unsigned char kPoison = 0xff;  // NaN in every type

thread_local Thread* current = nullptr;
const std::function<void()>* body = nullptr;  // of the launch under way
std::uint64_t seed = 0;

std::string planned;  // the kernel of the launches to come
int launched = 0;     // since it was planned
Fault fault;
std::set<Fault> found;

std::unique_ptr<Block> make_block(const Launch& launch, int x, int y, int rank) {
  auto block = std::make_unique<Block>();
  block->memory.resize(launch.shared + 2 * kBorder + 128);
  const auto first = reinterpret_cast<std::uintptr_t>(block->memory.data()) + kBorder;
  block->shared = reinterpret_cast<unsigned char*>((first + 127) / 128 * 128);
  std::fill(block->memory.begin(), block->memory.end(), kBorderByte);
  std::memset(block->shared, kPoison, launch.shared);
  block->bytes = launch.shared;
  block->x = x;
  block->y = y;
  block->rank = rank;
  block->threads = launch.threads;
  block->alive = launch.threads;
  for (int w = 0; w < launch.threads / kLanes; ++w) {
    block->warps.push_back(std::make_unique<Warp>());
  }
  return block;
}

// In words what is wrong with a cluster whose threads have ended; "" for nothing.
std::string left_behind(const Cluster& cluster) {
  if (!cluster.flights.empty()) return "a store to another block never came there";
  for (const auto& block : cluster.blocks) {
    const unsigned char* begin = block->memory.data();
    const unsigned char* first = block->shared;
    const auto intact = [](unsigned char byte) { return byte == kBorderByte; };
    if (!std::all_of(begin, first, intact) ||
        !std::all_of(first + block->bytes, begin + block->memory.size(), intact)) {
      return "a thread wrote beyond the shared memory of its block";
    }
  }
  return "";
}

void deliver(const Flight& flight) {
  std::memcpy(memory_at(flight.address, 4), &flight.value, 4);
  mbarrier_update(reinterpret_cast<std::uint64_t*>(memory_at(flight.barrier, 8)), 0, -4);
}

#ifndef RNNFAST_EMULATION_THREADS

// One fiber for each thread, which runs until it waits. The first switch to it is ucontext's; later
// ones jump, without the system call for the signal mask.
struct Fiber {
  ucontext_t start;
  std::jmp_buf place;
  std::vector<char> stack;
  Thread thread;
  bool begun = false, done = false;
  std::uint64_t seen = 0;         // progress when it began to wait
  const char* waiting = nullptr;  // null: it may go on
};

constexpr std::size_t kStack = 64 << 10;

std::jmp_buf scheduler;
Fiber* running = nullptr;
std::uint64_t moved = 1;
std::string failure;
std::mt19937_64 draw;

void enter() {
  (*body)();
  running->thread.block->alive.fetch_sub(1);
  running->done = true;
  ++moved;
  _longjmp(scheduler, 1);
}

// Apart, because what jumps must not share a frame with variables that are kept in registers.
[[gnu::noinline]] void prepare(Fiber& fiber) {
  fiber.stack.resize(kStack);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
  if (_setjmp(scheduler) == 0) {
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
  }
  running = nullptr;
}

void run_cluster(Cluster& cluster) {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> order;
  for (auto& block : cluster.blocks) {
    for (int t = 0; t < block->threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread = {&cluster, block.get(), block->warps[t / kLanes].get(), t};
      prepare(*fiber);
      order.push_back(fiber.get());
      fibers.push_back(std::move(fiber));
    }
  }
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), draw);
    bool ran = false;  // a thread, or a store that came where it went
    for (Fiber* fiber : order) {
      if (fiber->waiting && fiber->seen == moved) continue;  // nothing has come since
      ran = true;
      if (fiber->thread.warp->asleep > 0 || draw() % 8 == 0) continue;  // some lag behind
      fiber->waiting = nullptr;
      resume(*fiber);
      if (!failure.empty()) throw std::runtime_error(failure);
    }
    for (auto& block : cluster.blocks) {  // and a warp now and then for long
      for (auto& warp : block->warps) {
        if (warp->asleep > 0) {
          --warp->asleep;
        } else if (draw() % 64 == 0) {
          warp->asleep = static_cast<int>(draw() % 128);
        }
      }
    }
    std::erase_if(order, [](Fiber* fiber) { return fiber->done; });
    auto& flights = cluster.flights;
    for (std::size_t n = flights.empty() ? 0 : draw() % (flights.size() + 1); n > 0; --n) {
      std::swap(flights[draw() % flights.size()], flights.back());
      const Flight flight = flights.back();
      flights.pop_back();
      current = &fibers.front()->thread;
      deliver(flight);
      ran = true;
    }
    if (!ran && flights.empty() && !order.empty()) {
      throw std::runtime_error(std::string("deadlock: a thread waits for ") +
                               order.front()->waiting);
    }
  }
}

#else

void run_cluster(Cluster& cluster) {
  std::vector<Thread> threads;
  for (auto& block : cluster.blocks) {
    for (int t = 0; t < block->threads; ++t) {
      threads.push_back({&cluster, block.get(), block->warps[t / kLanes].get(), t});
    }
  }
  std::atomic<bool> over{false};
  std::thread carrier([&] {
    current = &threads.front();
    for (;;) {
      const bool last = over.load();
      std::deque<Flight> found;
      {
        std::lock_guard<std::mutex> lock(cluster.mutex);
        found.swap(cluster.flights);
      }
      for (const Flight& flight : found) deliver(flight);
      if (last) return;
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> hosts;
  for (Thread& thread : threads) {
    hosts.emplace_back([&thread] {
      current = &thread;
      (*body)();
      thread.block->alive.fetch_sub(1);
    });
  }
  for (std::thread& host : hosts) host.join();
  over = true;
  carrier.join();
}

#endif

}  // namespace

bool planning = false;

Thread& self() { return *current; }

#ifndef RNNFAST_EMULATION_THREADS

void yield(const char* waiting) {
  running->waiting = waiting;
  running->seen = moved;
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

void progress() { ++moved; }

void perturb() {}

void fail(const std::string& words) {
  if (running == nullptr) throw std::runtime_error(words);  // a store on its way, in no thread
  failure = words;
  _longjmp(scheduler, 1);
}

#else

void yield(const char*) { std::this_thread::yield(); }

void progress() {}

void perturb() {
  thread_local std::mt19937 draw(static_cast<unsigned>(seed) +
                                 static_cast<unsigned>(self().index) * 2654435761u);
  const unsigned number = draw();
  if (number % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(number / 64 % 300));
}

void fail(const std::string& words) {
  std::fprintf(stderr, "emulation: %s\n", words.c_str());
  std::abort();
}

#endif

void set_seed(std::uint64_t value) { seed = value; }

void plan(const std::string& kernel, const Fault& wanted) {
  planning = true;
  planned = kernel;
  launched = 0;
  fault = wanted;
}

const std::set<Fault>& places() { return found; }

bool planted(const char* file, int line, const char* change) {
  if (!fault.change.empty() && (line != fault.line || change != fault.change)) return false;
  const Fault here = {planned, file, line, change};
  if (fault.change.empty()) found.insert(here);
  return here == fault;
}

void launch(const Launch& launch, const std::function<void()>& kernel) {
  if (planning && planted("launch", launched++, "left out")) return;
  std::mt19937_64 order(seed);
  std::vector<std::pair<int, int>> clusters;
  for (int y = 0; y < launch.grid_y; ++y) {
    for (int x = 0; x < launch.grid_x; x += launch.cluster) clusters.emplace_back(x, y);
  }
  std::shuffle(clusters.begin(), clusters.end(), order);
#ifndef RNNFAST_EMULATION_THREADS
  draw.seed(seed);
  failure.clear();
#endif
  body = &kernel;
  for (const auto& [x, y] : clusters) {
    Cluster cluster;
    for (int rank = 0; rank < launch.cluster; ++rank) {
      cluster.blocks.push_back(make_block(launch, x + rank, y, rank));
    }
    run_cluster(cluster);
    const std::string wrong = left_behind(cluster);
    if (!wrong.empty()) throw std::runtime_error(wrong);
  }
}

void wait_at(Barrier& barrier, int threads, const char* name) {
  perturb();
  const int turn = barrier.turn.load(std::memory_order_acquire);
  if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.turn.store(turn + 1, std::memory_order_release);
    progress();
  } else {
    while (barrier.turn.load(std::memory_order_acquire) == turn) yield(name);
  }
  perturb();
}

// 1 bit of phase, 10 of arrivals a phase, 10 of arrivals yet to come, 43 of bytes, which may be
// fewer than none until they are expected.
void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  const std::uint64_t count = arrivals;
  std::atomic_ref(*barrier).store(count << 1 | count << 11 | std::uint64_t{1} << 62);
}

void mbarrier_update(std::uint64_t* barrier, int arrivals, std::int64_t bytes) {
  std::atomic_ref<std::uint64_t> word(*barrier);
  std::uint64_t old = word.load(std::memory_order_relaxed), next;
  do {
    const std::int64_t expected = static_cast<std::int64_t>(old >> 21) - (std::int64_t{1} << 41);
    const std::int64_t due = static_cast<std::int64_t>(old >> 11 & 1023) - arrivals;
    const std::uint64_t each = old >> 1 & 1023;
    if (due < 0) fail("more arrivals at an mbarrier than it was made for");
    const bool complete = due == 0 && expected + bytes == 0;
    next = ((old & 1) ^ (complete ? 1 : 0)) | each << 1 |
           (complete ? each : static_cast<std::uint64_t>(due)) << 11 |
           static_cast<std::uint64_t>(expected + bytes + (std::int64_t{1} << 41)) << 21;
  } while (
      !word.compare_exchange_weak(old, next, std::memory_order_acq_rel, std::memory_order_relaxed));
  progress();
}

bool mbarrier_phase(const std::uint64_t* barrier) {
  std::atomic_ref<std::uint64_t> word(*const_cast<std::uint64_t*>(barrier));
  return word.load(std::memory_order_acquire) & 1;
}

std::uint32_t address_of(const void* shared) {
  const Block& block = *self().block;
  const auto offset = static_cast<const unsigned char*>(shared) - block.shared;
  return static_cast<std::uint32_t>(offset) | static_cast<std::uint32_t>(block.rank) << 24;
}

unsigned char* memory_at(std::uint32_t address, std::size_t bytes) {
  const std::uint32_t rank = address >> 24, offset = address & 0xffffff;
  Cluster& cluster = *self().cluster;
  if (rank >= cluster.blocks.size()) fail("an address in no block of the cluster");
  Block& block = *cluster.blocks[rank];
  if (offset + bytes > block.bytes) fail("an address beyond the shared memory of a block");
  if (block.alive.load() == 0) fail("a store to a block that has ended");
  return block.shared + offset;
}

void send(const Flight& flight) {
  perturb();
  std::lock_guard<std::mutex> lock(self().cluster->mutex);
  self().cluster->flights.push_back(flight);
}

}  // namespace rnnfast::emulation
