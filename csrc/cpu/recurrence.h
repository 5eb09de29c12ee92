// The time loops, generic over the cell (csrc/cells) and the storage type S.
#pragma once

#include "parallel.h"
#include "plan.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Rows [first, first + count) of the batch in one group, walked by one task.
struct Slice {
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
  return {task / plan.slices, first, part_begin(batch, plan.slices, index + 1) - first};
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

// ---------------------------------------------------------------------------------------- forward

// Rows of x that are copied and projected at once.
constexpr int64_t kInputRows = 96;

template <class Cell, class S, class P>
struct ForwardTask : Task<Cell, S> {
  using Base = Task<Cell, S>;
  using Base::L;
  using typename Base::A;
  using typename Base::V;

  const ForwardProblem* problem;
  Packed<A> weights;
  A* old_state;  // as stored in y: rounded, so that backward and dW see what the step saw
  A* new_state;
  A* carried;  // [kCarried][rows]

  // Where x is given: p of a few steps at a time, which is never written out.
  int64_t chunk;  // steps
  Packed<A> input_weights;
  A* inputs;     // this thread's copy of rows of x
  A* projected;  // [chunk][rows]

  // Enough rows for the weights to be read from the second-level cache a few times only, few
  // enough for p to stay there.
  static int64_t chunk_steps(int64_t steps, int64_t rows) {
    const int64_t chunk = rows > 128 ? 1 : 256 / (rows > 0 ? rows : 1);
    return chunk < steps ? chunk : steps;
  }
  static int64_t scratch_elements(int64_t rows, int64_t stride, int64_t chunk, int64_t size) {
    return whole_blocks<A>((2 + Cell::kCarried) * rows * stride +
                           chunk * rows * row_stride<A>(Cell::kGates * size));
  }

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    for (int64_t i = 0; i < steps; ++i) {
      if (chunk > 0 && i % chunk == 0) project(i, steps - i < chunk ? steps - i : chunk);
      step(i);
      this->crew.wait();  // new_state is whole, and old_state is read no more
      A* const swap = old_state;
      old_state = new_state;
      new_state = swap;
    }
    end();
  }

 private:
  RNNFAST_INLINE int64_t place(int64_t row, int64_t unit) const {
    return row * this->stride + unit;
  }
  RNNFAST_INLINE A* carried_at(int index, int64_t row, int64_t unit) const {
    return carried + index * this->slice.count * this->stride + place(row, unit);
  }

  void begin() {
    this->for_each_vector([&](int64_t row, int64_t unit) {
      store_raw(old_state + place(row, unit), this->state_or_zero(problem->h0, 0, row, unit));
      for (int i = 0; i < Cell::kCarried; ++i)
        store_raw(carried_at(i, row, unit), this->state_or_zero(problem->carried0, i, row, unit));
    });
    this->crew.wait();
  }

  void end() {
    this->for_each_vector([&](int64_t row, int64_t unit) {
      const int64_t count = this->shape.size - unit;
      store(this->template state<S>(problem->h_n, 0, row, unit),
            narrow<S>(load(old_state + place(row, unit))), count);
      for (int i = 0; i < Cell::kCarried; ++i)
        store(this->template state<S>(problem->carried_n, i, row, unit),
              narrow<S>(load(carried_at(i, row, unit))), count);
    });
  }

  RNNFAST_INLINE int64_t time(int64_t i) const {
    return this->reverse() ? this->shape.steps - 1 - i : i;
  }
  int64_t projected_stride() const { return row_stride<A>(Cell::kGates * this->shape.size); }

  // p of the `count` steps from the i-th on: this member's units of it, which nobody else reads.
  void project(int64_t i, int64_t count) {
    const int64_t rows = this->slice.count;
    const int64_t input_stride = row_stride<A>(problem->input_size);
    const int64_t size = this->shape.size;
    const auto counts = [&](int64_t index) {
      return this->lengths == nullptr || time(i + index / rows) < this->length(index % rows);
    };
    for (int64_t first = 0, end; first < count * rows; first = end) {
      end = count * rows - first < kInputRows ? count * rows : first + kInputRows;
      for (int64_t index = first; index < end; ++index)
        copy_row(inputs + (index - first) * input_stride,
                 static_cast<const S*>(problem->x.data) +
                     time(i + index / rows) * problem->x.stride_t +
                     (this->slice.first + index % rows) * problem->x.stride_b,
                 problem->input_size);
      const Tiling tiles =
          make_tiling(end - first, this->tiling.first_unit, this->tiling.units.total, Cell::kGates);
      const auto skip = [&](int64_t row, int64_t row_end) RNNFAST_INLINE_LAMBDA {
        while (row < row_end && !counts(first + row)) ++row;
        return row == row_end;
      };
      const auto epilogue = [&](int64_t row, int64_t vector, int64_t vector_end, const V* p)
                                RNNFAST_INLINE_LAMBDA {
                                  A* const to = projected + (first + row) * projected_stride();
                                  for (; vector < vector_end; ++vector)
                                    for (int gate = 0; gate < Cell::kGates; ++gate, ++p)
                                      store(to + gate * size + vector * L, *p, size - vector * L);
                                };
      for_each_product<A, Cell::kGates>(input_weights, inputs, input_stride, tiles, skip, epilogue);
    }
  }

  struct Step {
    Rows<const P> p, next_p;
    Rows<S> y, next_y, saved;
    Rows<const A> old_state;
    Rows<A> new_state, carried;
    int64_t carried_stride;  // from one carried value to the next
    int64_t size;
  };

  RNNFAST_INLINE Rows<const P> rows_of_p(int64_t i) const {
    if constexpr (__is_same(P, A)) {
      if (chunk > 0)
        return {projected + i % chunk * this->slice.count * projected_stride(), projected_stride()};
    }
    return this->template rows<const P>(problem->p, Cell::kGates, time(i));
  }

  void step(int64_t i) {
    const int64_t t = time(i);
    const int64_t next = time(i + 1 < this->shape.steps ? i + 1 : i);  // for what is prefetched
    const Step at = {rows_of_p(i),
                     rows_of_p(i + 1 < this->shape.steps ? i + 1 : i),
                     this->template rows<S>(problem->y, 1, t),
                     this->template rows<S>(problem->y, 1, next),
                     this->template rows<S>(problem->saved, Cell::kSaved, t),
                     {old_state, this->stride},
                     {new_state, this->stride},
                     {carried, this->stride},
                     this->slice.count * this->stride,
                     this->shape.size};
    const int64_t* const lengths =
        this->lengths != nullptr ? this->lengths + this->slice.first : nullptr;
    const auto active = [=](int64_t row) RNNFAST_INLINE_LAMBDA {
      return lengths == nullptr || t < lengths[row];
    };
    const auto skip = [&](int64_t row, int64_t end) RNNFAST_INLINE_LAMBDA {
      while (row < end && !active(row)) ++row;
      return row == end;
    };
    const auto epilogue = [&](int64_t row, int64_t vector, int64_t end,
                              const V* u) RNNFAST_INLINE_LAMBDA {
      if (active(row)) {
        for (; vector < end && end * L <= at.size; ++vector, u += Cell::kGates)
          point<true>(at, row, vector * L, u);
        for (; vector < end; ++vector, u += Cell::kGates) point<false>(at, row, vector * L, u);
      } else {
        for (; vector < end; ++vector) pass(at, row, vector * L);
      }
    };
    for_each_product<A, Cell::kGates>(weights, old_state, this->stride, this->tiling, skip,
                                      epilogue);
  }

  // A step outside the row's length.
  RNNFAST_INLINE static void pass(const Step& at, int64_t row, int64_t unit) {
    store_raw(at.new_state.at(row, unit), load(at.old_state.at(row, unit)));
    store(at.y.at(row, unit), Raw<S>{}, at.size - unit);
  }

  // Kept short: several of them at once, divisions and all, fit what the processor looks ahead.
  template <bool kWhole>
  RNNFAST_INLINE static void point(const Step& at, int64_t row, int64_t unit, const V* u) {
    const int64_t count = at.size - unit;
    at.next_p.prefetch(row, unit);
    at.next_y.prefetch(row, unit);
    Values<V, Cell::kGates> p;
    Values<V, Cell::kCarried> state;
    Values<V, Cell::kSaved> saved;
    for (int i = 0; i < Cell::kGates; ++i)
      p.at[i] = load_if<kWhole>(at.p.at(row, unit + i * at.size), count);
    for (int i = 0; i < Cell::kCarried; ++i)
      state.at[i] = load(at.carried.at(row, unit) + i * at.carried_stride);
    const V h_prev = load(at.old_state.at(row, unit));
    const Raw<S> h = narrow<S>(Cell::forward(p.at, u, h_prev, state.at, saved.at));
    store_if<kWhole>(at.y.at(row, unit), h, count);
    store_raw(at.new_state.at(row, unit), widen<S>(h));
    for (int i = 0; i < Cell::kCarried; ++i)
      store_raw(at.carried.at(row, unit) + i * at.carried_stride, state.at[i]);
    for (int i = 0; i < Cell::kSaved; ++i)
      store_if<kWhole>(at.saved.at(row, unit + i * at.size), narrow<S>(saved.at[i]), count);
  }
};

// --------------------------------------------------------------------------------------- backward

template <class Cell, class S>
struct BackwardTask : Task<Cell, S> {
  using Base = Task<Cell, S>;
  using Base::L;
  using typename Base::A;
  using typename Base::V;

  const BackwardProblem* problem;
  Packed<A> weights;
  int64_t du_stride;  // of a row of gates * S
  A* old_du;          // as stored, so that the carry and dW are made of the same numbers
  A* new_du;
  A* direct;    // direct part of the carry
  A* dcarried;  // [kCarried][rows]

  static int64_t scratch_elements(int64_t rows, int64_t stride, int64_t du_stride) {
    const int64_t others = (Cell::kDirectGradient ? 1 : 0) + Cell::kCarried;
    return whole_blocks<A>(rows * (2 * du_stride + others * stride));
  }

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    for (int64_t i = 0; i < steps; ++i) {
      step(this->reverse() ? i : steps - 1 - i);
      this->crew.wait();  // new_du is whole, and old_du is read no more
      A* const swap = old_du;
      old_du = new_du;
      new_du = swap;
    }
    end();
  }

 private:
  RNNFAST_INLINE int64_t place(int64_t row, int64_t unit) const {
    return row * this->stride + unit;
  }
  RNNFAST_INLINE A* dcarried_at(int index, int64_t row, int64_t unit) const {
    return dcarried + index * this->slice.count * this->stride + place(row, unit);
  }
  void begin() {
    if (this->crew.index == 0)
      for (int64_t i = 0; i < this->slice.count * du_stride; ++i) old_du[i] = 0;
    this->for_each_vector([&](int64_t row, int64_t unit) {
      if constexpr (Cell::kDirectGradient) store_raw(direct + place(row, unit), V{});
      for (int i = 0; i < Cell::kCarried; ++i)
        store_raw(dcarried_at(i, row, unit),
                  this->state_or_zero(problem->grad_carried_n, i, row, unit));
    });
    this->crew.wait();
  }

  struct Step {
    Rows<const S> grad_y, next_grad_y, y, next_y, before, saved;
    Rows<S> dp, next_dp, du;
    Rows<const A> old_du;
    Rows<A> new_du, direct, dcarried;
    int64_t dcarried_stride;
    int64_t size;
  };

  void step(int64_t t) {
    const bool reverse = this->reverse();
    const int64_t steps = this->shape.steps;
    const int64_t before = reverse ? t + 1 : t - 1;
    const int64_t next = before < 0 || before == steps ? t : before;  // for what is prefetched
    const Step at = {this->template rows<const S>(problem->grad_y, 1, t),
                     this->template rows<const S>(
                         problem->grad_y.data != nullptr ? problem->grad_y : problem->y, 1, next),
                     this->template rows<const S>(problem->y, 1, t),
                     this->template rows<const S>(problem->y, 1, next),
                     this->template rows<const S>(problem->y, 1, next),
                     this->template rows<const S>(problem->saved, Cell::kSaved, t),
                     this->template rows<S>(problem->dp, Cell::kGates, t),
                     this->template rows<S>(problem->dp, Cell::kGates, next),
                     this->template rows<S>(problem->du, Cell::kGates, t),
                     {old_du, du_stride},
                     {new_du, du_stride},
                     {direct, this->stride},
                     {dcarried, this->stride},
                     this->slice.count * this->stride,
                     this->shape.size};
    const int64_t* const lengths =
        this->lengths != nullptr ? this->lengths + this->slice.first : nullptr;
    const auto length = [=](int64_t row) RNNFAST_INLINE_LAMBDA {
      return lengths != nullptr ? lengths[row] : steps;
    };
    // The step at which BPTT enters the row: its carry is grad_h_n.
    const auto enters = [=](int64_t row)
                            RNNFAST_INLINE_LAMBDA { return t == (reverse ? 0 : length(row) - 1); };
    const auto skip = [&](int64_t row, int64_t end) RNNFAST_INLINE_LAMBDA {
      while (row < end && (t >= length(row) || enters(row))) ++row;
      return row == end;
    };
    const auto epilogue = [&](int64_t row, int64_t vector, int64_t end,
                              const V* product) RNNFAST_INLINE_LAMBDA {
      if (t >= length(row)) {
        for (; vector < end; ++vector) pass(at, row, vector * L);
      } else if (enters(row)) {
        for (; vector < end; ++vector)
          point<false>(at, t, row, vector * L,
                       this->state_or_zero(problem->grad_h_n, 0, row, vector * L));
      } else if (end * L <= at.size) {
        for (; vector < end; ++vector, ++product)
          point<true>(at, t, row, vector * L, carry(at, row, vector * L, product));
      } else {
        for (; vector < end; ++vector, ++product)
          point<false>(at, t, row, vector * L, carry(at, row, vector * L, product));
      }
    };
    for_each_product<A, 1>(weights, old_du, du_stride, this->tiling, skip, epilogue);
  }

  RNNFAST_INLINE static V carry(const Step& at, int64_t row, int64_t unit, const V* product) {
    if constexpr (Cell::kDirectGradient) return product[0] + load(at.direct.at(row, unit));
    return product[0];
  }

  // With several gates the rest of the last vector belongs to the next gate.
  template <bool kWhole>
  RNNFAST_INLINE static void keep_du(const Step& at, int64_t row, int64_t unit, int gate, V value) {
    A* const to = at.new_du.at(row, gate * at.size + unit);
    store_if<kWhole || Cell::kGates == 1>(to, value, at.size - unit);
  }

  // A step outside the row's length: the gradient waits, nothing flows into p.
  RNNFAST_INLINE static void pass(const Step& at, int64_t row, int64_t unit) {
    const int64_t count = at.size - unit;
    for (int i = 0; i < Cell::kGates; ++i) {
      const int64_t place = unit + i * at.size;
      keep_du<false>(at, row, unit, i, load(at.old_du.at(row, place), count));
      store(at.dp.at(row, place), Raw<S>{}, count);
      if constexpr (Cell::kSplitGradient) store(at.du.at(row, place), Raw<S>{}, count);
    }
  }

  RNNFAST_INLINE V state_before(const Step& at, int64_t t, int64_t row, int64_t unit) const {
    const bool first = this->reverse() ? t == this->length(row) - 1 : t == 0;
    if (first) return this->state_or_zero(problem->h0, 0, row, unit);
    return load(at.before.at(row, unit), at.size - unit);
  }

  template <bool kWhole>
  RNNFAST_INLINE void point(const Step& at, int64_t t, int64_t row, int64_t unit, V dh) const {
    const int64_t count = at.size - unit;
    at.next_grad_y.prefetch(row, unit);
    at.next_y.prefetch(row, unit);
    at.next_dp.prefetch(row, unit);
    if (at.grad_y.data != nullptr) dh += load_if<kWhole>(at.grad_y.at(row, unit), count);
    const V h = load_if<kWhole>(at.y.at(row, unit), count);
    V h_before = {};
    if constexpr (Cell::kReadsPrevious) h_before = state_before(at, t, row, unit);
    Values<V, Cell::kSaved> saved;
    for (int i = 0; i < Cell::kSaved; ++i)
      saved.at[i] = load_if<kWhole>(at.saved.at(row, unit + i * at.size), count);
    Values<V, Cell::kCarried> state;
    for (int i = 0; i < Cell::kCarried; ++i)
      state.at[i] = load(at.dcarried.at(row, unit) + i * at.dcarried_stride);
    Values<V, Cell::kGates> dp;
    Values<V, Cell::kSplitGradient ? Cell::kGates : 0> du;
    const V bypass = Cell::backward(dh, h, h_before, saved.at, state.at, dp.at, du.at);
    if constexpr (Cell::kDirectGradient) store_raw(at.direct.at(row, unit), bypass);
    for (int i = 0; i < Cell::kCarried; ++i)
      store_raw(at.dcarried.at(row, unit) + i * at.dcarried_stride, state.at[i]);
    for (int i = 0; i < Cell::kGates; ++i) {
      Raw<S> stored = narrow<S>(dp.at[i]);
      store_if<kWhole>(at.dp.at(row, unit + i * at.size), stored, count);
      if constexpr (Cell::kSplitGradient) {
        stored = narrow<S>(du.at[i]);
        store_if<kWhole>(at.du.at(row, unit + i * at.size), stored, count);
      }
      keep_du<kWhole>(at, row, unit, i, widen<S>(stored));
    }
  }

  void end() {
    if (problem->dh0 == nullptr && problem->dcarried0 == nullptr) return;
    const auto skip = [&](int64_t, int64_t)
                          RNNFAST_INLINE_LAMBDA { return problem->dh0 == nullptr; };
    const auto epilogue = [&](int64_t row, int64_t vector, int64_t end,
                              const V* product) RNNFAST_INLINE_LAMBDA {
      for (; vector < end; ++vector, ++product) {
        const int64_t unit = vector * L;
        const int64_t count = this->shape.size - unit;
        if (problem->dh0 != nullptr) {
          V dh0 = this->state_or_zero(problem->grad_h_n, 0, row, unit);  // of a row of length 0
          if (this->length(row) > 0) {
            dh0 = product[0];
            if constexpr (Cell::kDirectGradient) dh0 += load(direct + place(row, unit));
          }
          store(this->template state<S>(problem->dh0, 0, row, unit), narrow<S>(dh0), count);
        }
        if (problem->dcarried0 != nullptr) {
          for (int i = 0; i < Cell::kCarried; ++i)
            store(this->template state<S>(problem->dcarried0, i, row, unit),
                  narrow<S>(load(dcarried_at(i, row, unit))), count);
        }
      }
    };
    for_each_product<A, 1>(weights, old_du, du_stride, this->tiling, skip, epilogue);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
