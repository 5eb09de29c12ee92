// How one call is cut into tasks and its scratch memory laid out.
#pragma once

#include "microkernel.h"
#include "problem.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Below this many multiply-adds (some 10 us) a second thread costs more than it brings, and each
// further one wants half as many for itself.
#ifndef RNNFAST_WORTH_THREADS
#define RNNFAST_WORTH_THREADS 2e5
#endif
// And so it does below this many in a step, where threads wait for one another.
#ifndef RNNFAST_WORTH_WAITING
#define RNNFAST_WORTH_WAITING 3e4
#endif
// A thread that has to be started first costs ten times as much as one that waits for work.
#ifndef RNNFAST_WORTH_STARTING
#define RNNFAST_WORTH_STARTING 2e6
#endif

// The most of `threads` that have half of `worth` multiply-adds each.
RNNFAST_INLINE int64_t shared_by(int64_t threads, double multiply_adds, double worth) {
  const bool all = 2 * multiply_adds >= worth * static_cast<double>(threads);
  return all ? threads : static_cast<int64_t>(2 * multiply_adds / worth);
}

// lanes: outputs of a vector, which no two threads share.
RNNFAST_INLINE Plan make_plan(const Shape& shape, int gates, int lanes, int most,
                              double worth = RNNFAST_WORTH_THREADS) {
  Plan plan = {shape.directions * shape.heads, 1, 1, 1};
  const double step = static_cast<double>(shape.batch) * static_cast<double>(gates) *
                      static_cast<double>(shape.size) * static_cast<double>(shape.size);
  const double work = static_cast<double>(shape.steps) * static_cast<double>(plan.groups) * step;
  if (most <= 1 || work < worth) return plan;
  const int64_t threads = shared_by(most, work, worth);
  // The fewest slices that give every thread the same number of tasks.
  plan.slices = 1;
  while (plan.slices < threads && plan.slices * plan.groups % threads != 0) ++plan.slices;
  // A slice of one row reads all weights for a single product each.
  const bool waits = step >= RNNFAST_WORTH_WAITING;
  const int64_t most_slices = waits && shape.batch > 1 ? shape.batch / 2 : shape.batch;
  if (plan.slices > most_slices) {
    // Then those that keep most threads busy, the fewest of them.
    const auto parts = [&](int64_t slices) -> int64_t {
      const int64_t tasks = plan.groups * slices;
      if (!waits || tasks >= threads) return 1;
      const double each = step / static_cast<double>(slices);
      const int64_t parts = shared_by(threads / tasks, each, RNNFAST_WORTH_WAITING);
      const int64_t units = ceil_div(shape.size, lanes);
      return parts < 1 ? 1 : parts < units ? parts : units;
    };
    const auto busy = [&](int64_t slices) {
      const int64_t found = plan.groups * slices * parts(slices);
      return found < threads ? found : threads;
    };
    plan.slices = 1;
    for (int64_t slices = 2; slices <= most_slices; ++slices)
      if (busy(slices) > busy(plan.slices)) plan.slices = slices;
    plan.parts = parts(plan.slices);
  }
  const int64_t used = plan.tasks() * plan.parts;
  plan.threads = static_cast<int>(used < threads ? used : threads);
  return plan;
}

// Offset of one group's units for batch row b in a contiguous [D, B, heads * S].
RNNFAST_INLINE int64_t state_offset(const Shape& shape, int64_t group, int64_t b) {
  const int64_t direction = group / shape.heads;
  const int64_t head = group % shape.heads;
  return ((direction * shape.batch + b) * shape.heads + head) * shape.size;
}

// Elements rounded up to whole 128-byte blocks, so that no two tasks share a cache line.
template <class A>
RNNFAST_INLINE int64_t whole_blocks(int64_t elements) {
  constexpr int64_t kBlock = 128 / static_cast<int64_t>(sizeof(A));
  return ceil_div(elements, kBlock) * kBlock;
}

// Stride of a state row in scratch: room for the last vector's padding, and an odd number of cache
// lines, since rows a multiple of 4096 bytes apart would compete for one set of the L1 cache.
template <class A>
RNNFAST_INLINE int64_t row_stride(int64_t size) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
  const int64_t lines = ceil_div(size + kLanes<A> - 1, kLine);
  return (lines | 1) * kLine;
}

// Where the packed weights of every group lie.
template <class A>
struct PackedLayout {
  int64_t inner;
  int64_t units;  // vectors of outputs
  int gates;      // panels per vector of outputs
  bool bias;
  Sums sums;

  int64_t panel_stride() const { return (inner + (bias ? 1 : 0)) * kLanes<A>; }
  int64_t group_stride() const { return whole_blocks<A>(units * gates * panel_stride()); }
  Packed<A> group(const A* data, int64_t index) const {
    return {data + index * group_stride(), inner, panel_stride(), bias, sums};
  }
};

// values[0, count) <- a row of the storage type, and zeros up to the end of the last vector.
template <class S>
RNNFAST_INLINE void copy_row(Arithmetic<S>* to, const S* from, int64_t count) {
  constexpr int L = kLanes<Arithmetic<S>>;
  for (int64_t i = 0; i < count; i += L) store_raw(to + i, load(from + i, count - i));
}

// Panels for W v: outputs are the rows of each gate's [outputs, inner] block; before them the sum
// of the biases that are not null.
template <class S>
void pack_rows(const S* w, const S* bias, const S* more_bias, int64_t inner, int64_t outputs,
               int gates, int64_t unit, Arithmetic<S>* panels) {
  using A = Arithmetic<S>;
  constexpr int L = kLanes<A>;
  const int64_t first = unit * L;
  const int64_t here = outputs - first < L ? outputs - first : L;
  for (int gate = 0; gate < gates; ++gate) {
    if (bias != nullptr) {
      Vec<A> start = load(bias + gate * outputs + first, here);
      if (more_bias != nullptr) start += load(more_bias + gate * outputs + first, here);
      store_raw(panels, start);
      panels += L;
    }
    const S* block = w + (gate * outputs + first) * inner;
    for (int64_t k = 0; k < inner; k += L, panels += L * L) {
      const int64_t count = inner - k < L ? inner - k : L;
      A square[L][L] = {};  // of the transpose, read and written a vector at a time
      for (int64_t i = 0; i < here; ++i)
        store_raw(&square[i][0], load(block + i * inner + k, count));
      for (int64_t j = 0; j < count; ++j) {
        for (int i = 0; i < L; ++i) panels[j * L + i] = square[i][j];
      }
      if (count < L) panels -= (L - count) * L;
    }
  }
}

// Panels for v W: outputs are the columns of [inner, outputs].
template <class S>
void pack_columns(const S* w, int64_t inner, int64_t outputs, int64_t unit, Arithmetic<S>* panels) {
  constexpr int L = kLanes<Arithmetic<S>>;
  const int64_t first = unit * L;
  for (int64_t k = 0; k < inner; ++k)
    store_raw(panels + k * L, load(w + k * outputs + first, outputs - first));
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
