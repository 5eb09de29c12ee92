// Shared by the time loops of forward.h and backward.h.
#pragma once

#include "parallel.h"
#include "plan.h"
#include "points.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Rows [first, first + count) of the batch in one group, walked by one task.
struct Slice {
  int64_t task;
  int64_t group;
  int64_t first;
  int64_t count;
};

// h before the first step, [D, B, heads * S], and after a reset, [groups * S]; null for zeros.
struct Edges {
  const void* first;
  const void* rest;
};

// The threads that share one task, seen from one of them.
struct Crew {
  int index;
  int count;
  Barrier* barrier;

  RNNFAST_INLINE void wait() const {
    if (count > 1) barrier->wait(count);
  }
};

RNNFAST_INLINE Slice make_slice(const Plan& plan, int64_t batch, int64_t task) {
  const int64_t index = task % plan.slices;
  const int64_t first = part_begin(batch, plan.slices, index);
  return {task, task / plan.slices, first, part_begin(batch, plan.slices, index + 1) - first};
}

// A task, as forward and backward both see it.
template <class S>
struct Task {
  using A = Arithmetic<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const CellPoints<S>* cell;
  Shape shape;
  Slice slice;
  Crew crew;
  const int64_t* lengths;
  const std::uint8_t* reset;
  Tiling tiling;   // of what this member of the crew computes
  int64_t stride;  // of a state row in scratch

  // Calls body(row, unit) for the vectors of units that this member computes.
  template <class Body>
  RNNFAST_INLINE void for_each_vector(Body&& body) const {
    for (int64_t row = 0; row < slice.count; ++row)
      for (int64_t v = 0; v < tiling.units.total; ++v) body(row, (tiling.first_unit + v) * L);
  }

  RNNFAST_INLINE bool reverse() const { return slice.group >= shape.heads; }
  RNNFAST_INLINE int64_t length(int64_t row) const {
    return lengths != nullptr ? lengths[slice.first + row] : shape.steps;
  }
  // Which of the slice's rows have a reset between real steps edge - 1 and edge; null for none.
  RNNFAST_INLINE const std::uint8_t* resets(int64_t edge) const {
    if (reset == nullptr || edge >= shape.steps) return nullptr;
    return reset + edge * shape.batch + slice.first;
  }
  // A reset past the row's end is none.
  RNNFAST_INLINE bool cut(int64_t edge, int64_t row) const {
    const std::uint8_t* const at = resets(edge);
    return at != nullptr && edge < length(row) && at[row] != 0;
  }
  // The units that this member computes.
  RNNFAST_INLINE int64_t first_unit() const { return tiling.first_unit * L; }
  RNNFAST_INLINE int64_t end_unit() const { return (tiling.first_unit + tiling.units.total) * L; }
  RNNFAST_INLINE int64_t group_width() const {
    return slice.group * cell->facts.gates * shape.size;
  }
  // Elements of one vector of units of every group: a cell's parameter, or the weights of a norm.
  RNNFAST_INLINE int64_t all_units() const { return shape.directions * shape.heads * shape.size; }
  // Index of a row's one number in rstd [T, B, groups].
  RNNFAST_INLINE int64_t rstd_place(int64_t t, int64_t row) const {
    return (t * shape.batch + slice.first + row) * shape.directions * shape.heads + slice.group;
  }
  // The slice's rows of the sequence at step t, from this group's first value on.
  template <class To, class Pointer>
  RNNFAST_INLINE Rows<To> rows(const Sequence<Pointer>& sequence, int values, int64_t t) const {
    if (sequence.data == nullptr) return {};
    return {static_cast<To*>(sequence.data) + t * sequence.stride_t +
                slice.first * sequence.stride_b + slice.group * values * shape.size,
            sequence.stride_b};
  }
  // One state vector of a contiguous [D, B, heads * S].
  template <class To, class Pointer>
  RNNFAST_INLINE To* state(Pointer data, int64_t row, int64_t unit) const {
    return static_cast<To*>(data) + state_offset(shape, slice.group, slice.first + row) + unit;
  }
  RNNFAST_INLINE V state_or_zero(const void* data, int64_t row, int64_t unit) const {
    if (data == nullptr) return V{};
    return load(state<const S>(data, row, unit), shape.size - unit);
  }
};

// h as it is stored, in place.
template <class S>
RNNFAST_INLINE void round_to_storage(Arithmetic<S>* h, int64_t count) {
  constexpr int L = kLanes<Arithmetic<S>>;
  for (int64_t i = 0; i < count; i += L)
    store(h + i, widen<S>(narrow<S>(load(h + i, count - i))), count - i);
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
