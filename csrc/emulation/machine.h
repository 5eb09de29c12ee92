// A stand-in for a GPU, on the host: blocks of threads that wait for one another, clusters of
// blocks that write into each other's shared memory. For tests: it finds errors of order, memory
// and convergence. It says nothing about time.
//
// Threads are fibers whose turns are drawn from a seed, so that a failure can be repeated. With
// RNNFAST_EMULATION_THREADS they are threads of the host with random delays, for the sanitizers.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <source_location>
#include <string>
#include <vector>

namespace rnnfast::emulation {

constexpr int kLanes = 32;

// The words that a lane gives to an operation of its warp, and the words that it gets back.
struct Slot {
  int operation;
  std::uint32_t in[10];
  std::uint32_t out[4];
};

// Threads wait here until all of them have arrived.
struct Barrier {
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};
};

struct Warp {
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};
  int asleep = 0;         // turns that this warp leaves to the others
  Slot slots[2][kLanes];  // of this operation and of the one before, which some may still read
};

struct Block {
  std::vector<unsigned char> memory;  // shared memory, and a border that no thread may touch
  unsigned char* shared = nullptr;
  std::size_t bytes = 0;
  int x = 0, y = 0;
  int rank = 0;  // in the cluster
  int threads = 0;
  std::atomic<int> alive{0};
  Barrier barriers[16];
  std::vector<std::unique_ptr<Warp>> warps;
};

// A store into the shared memory of a block of the cluster that has not arrived yet.
struct Flight {
  std::uint32_t address, value, barrier;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  std::mutex mutex;
  std::deque<Flight> flights;
};

struct Thread {
  Cluster* cluster = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;     // in the block
  int unfenced = 0;  // mbarriers that it has made since its last fence
};

// The thread of the device that runs now.
Thread& self();

// Lets other threads run. A thread that waits calls it in a loop; `waiting` names the event.
void yield(const char* waiting);

// Says that an event has happened for which a thread may wait.
void progress();

// Stands between any two accesses to memory: other threads may run here.
void perturb();

// Ends the launch, which throws std::runtime_error with these words.
[[noreturn]] void fail(const std::string& words);

struct Launch {
  int grid_x = 1, grid_y = 1;
  int threads = kLanes;
  int cluster = 1;  // blocks, along x
  std::size_t shared = 0;
};

// Runs the kernel for every thread of the grid, one cluster after another in an order of the seed.
void launch(const Launch& launch, const std::function<void()>& kernel);

void set_seed(std::uint64_t seed);

// ------------------------------------------------------------------------------ planted faults
// One call of a kernel goes wrong. Its place in the source names it. A test checks that the fault
// is found. For fibers alone.

using Where = std::source_location;

struct Fault {
  std::string kernel, file;  // as plan() and the compiler have them
  int line = 0;
  std::string change;  // "left out", ...
  auto operator<=>(const Fault&) const = default;
};

// Names the kernel of the next launches. Without a fault the emulation collects places() instead.
void plan(const std::string& kernel, const Fault& fault = {});
extern bool planning;

// The places where a fault can be planted, in all code that ran since the first plan().
const std::set<Fault>& places();

bool planted(const char* file, int line, const char* change);
inline bool planted(const Where& where, const char* change) {
  return planning && planted(where.file_name(), static_cast<int>(where.line()), change);
}

// ------------------------------------------------------------------------------ waiting

void wait_at(Barrier& barrier, int threads, const char* name);

// An operation of the warp: every lane gives its words; the last lane to arrive calls
// compute(slots) for all of them.
template <class Compute>
const Slot& together(int operation, const std::uint32_t* words, int count, Compute compute) {
  Warp& warp = *self().warp;
  perturb();
  const int turn = warp.turn.load(std::memory_order_acquire);
  Slot* slots = warp.slots[turn & 1];
  Slot& mine = slots[self().index % kLanes];
  mine.operation = operation;
  for (int i = 0; i < count; ++i) mine.in[i] = words[i];
  if (warp.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (slots[lane].operation != operation) fail("the lanes of a warp have parted");
    }
    compute(slots);
    warp.arrived.store(0, std::memory_order_relaxed);
    warp.turn.store(turn + 1, std::memory_order_release);
    progress();
  } else {
    while (warp.turn.load(std::memory_order_acquire) == turn) yield("the other lanes of its warp");
  }
  return mine;
}

// ------------------------------------------------------------------------------ mbarriers
// In their own 64 bits, so that the emulation finds a kernel that overwrites one.

void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals);
void mbarrier_update(std::uint64_t* barrier, int arrivals, std::int64_t bytes);
bool mbarrier_phase(const std::uint64_t* barrier);

// Addresses of the shared memory of a cluster: the rank of the block in the upper 8 bits.
std::uint32_t address_of(const void* shared);
unsigned char* memory_at(std::uint32_t address, std::size_t bytes);
void send(const Flight& flight);

}  // namespace rnnfast::emulation
