// What the time loops of both directions share: forward.h and backward.h.
#pragma once

#include "parallel.h"
#include "plan.h"
#include "rows.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Rows [first, first + count) of the batch in one group, walked by one task.
struct Slice {
  int64_t task;
  int64_t group;
  int64_t first;
  int64_t count;
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

RNNFAST_INLINE int64_t state_elements(const Shape& shape) {
  return shape.directions * shape.batch * shape.heads * shape.size;
}

// What one step reads or writes of one tensor. A step holds these in local variables: it could
// not keep members in registers, since any store might change them.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  RNNFAST_INLINE T* at(int64_t row, int64_t unit) const { return data + row * stride + unit; }
  RNNFAST_INLINE Rows from(int64_t row) const { return {data + row * stride, stride}; }
  // Asks for the line ahead of its use: rows lie too far apart for the hardware to see a stream.
  RNNFAST_INLINE void prefetch(int64_t row, int64_t unit) const {
    __builtin_prefetch(at(row, unit));
  }
};

// Room for the values of a cell; one even where it has none, since C++ has no empty arrays.
template <class V, int kCount>
struct Values {
  V at[kCount > 0 ? kCount : 1];
};

// What both directions of the loop know about a task.
template <class Cell, class S>
struct Task {
  using A = Arithmetic<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

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
  RNNFAST_INLINE int64_t parameter(int64_t unit) const { return slice.group * shape.size + unit; }
  // Of the one number that a row has in rstd [T, B, groups].
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
  // One state vector of a contiguous [count, D, B, heads * S].
  template <class To, class Pointer>
  RNNFAST_INLINE To* state(Pointer data, int index, int64_t row, int64_t unit) const {
    return static_cast<To*>(data) + index * state_elements(shape) +
           state_offset(shape, slice.group, slice.first + row) + unit;
  }
  RNNFAST_INLINE V state_or_zero(const void* data, int index, int64_t row, int64_t unit) const {
    if (data == nullptr) return V{};
    return load(state<const S>(data, index, row, unit), shape.size - unit);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
