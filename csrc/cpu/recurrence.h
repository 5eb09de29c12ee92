// The time loops, generic over the cell (csrc/cells) and the storage type S.
#pragma once

#include "math.h"
#include "plan.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Rows [first, first + count) of the batch in one group, walked by one task.
struct Slice {
  int64_t group;
  int64_t first;
  int64_t count;
};

RNNFAST_INLINE Slice make_slice(const Plan& plan, int64_t batch, int64_t task) {
  const int64_t index = task % plan.slices;
  const int64_t first = part_begin(batch, plan.slices, index);
  return {task / plan.slices, first, part_begin(batch, plan.slices, index + 1) - first};
}

// Offset of one group's units for batch row b in a contiguous [D, B, heads * S].
RNNFAST_INLINE int64_t state_offset(const Shape& shape, int64_t group, int64_t b) {
  const int64_t direction = group / shape.heads;
  const int64_t head = group % shape.heads;
  return ((direction * shape.batch + b) * shape.heads + head) * shape.size;
}

RNNFAST_INLINE int64_t state_elements(const Shape& shape) {
  return shape.directions * shape.batch * shape.heads * shape.size;
}

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
  const int64_t* lengths;
  Tiling tiling;
  int64_t stride;  // of a state row in scratch

  RNNFAST_INLINE bool reverse() const { return slice.group >= shape.heads; }
  RNNFAST_INLINE int64_t length(int64_t row) const {
    return lengths != nullptr ? lengths[slice.first + row] : shape.steps;
  }
  RNNFAST_INLINE bool active(int64_t row, int64_t t) const {
    return lengths == nullptr || t < lengths[slice.first + row];
  }
  // `values` units of the sequence at (t, row), from unit `unit` of this group's first value.
  template <class To, class Pointer>
  RNNFAST_INLINE To* at(const Sequence<Pointer>& sequence, int values, int64_t t, int64_t row,
                        int64_t unit) const {
    return static_cast<To*>(sequence.data) + t * sequence.stride_t +
           (slice.first + row) * sequence.stride_b + slice.group * values * shape.size + unit;
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

template <class Cell, class S>
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

  static int64_t scratch_elements(int64_t rows, int64_t stride) {
    return whole_blocks<A>((2 + Cell::kCarried) * rows * stride);
  }

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    for (int64_t i = 0; i < steps; ++i) {
      step(this->reverse() ? steps - 1 - i : i);
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
    for (int64_t row = 0; row < this->slice.count; ++row) {
      for (int64_t unit = 0; unit < this->shape.size; unit += L) {
        store_raw(old_state + place(row, unit), this->state_or_zero(problem->h0, 0, row, unit));
        for (int i = 0; i < Cell::kCarried; ++i)
          store_raw(carried_at(i, row, unit), this->state_or_zero(problem->carried0, i, row, unit));
      }
    }
  }

  void end() {
    for (int64_t row = 0; row < this->slice.count; ++row) {
      for (int64_t unit = 0; unit < this->shape.size; unit += L) {
        const int64_t count = this->shape.size - unit;
        store(this->template state<S>(problem->h_n, 0, row, unit),
              narrow<S>(load(old_state + place(row, unit))), count);
        for (int i = 0; i < Cell::kCarried; ++i)
          store(this->template state<S>(problem->carried_n, i, row, unit),
                narrow<S>(load(carried_at(i, row, unit))), count);
      }
    }
  }

  void step(int64_t t) {
    const auto skip = [&](int64_t row, int64_t end) {
      while (row < end && !this->active(row, t)) ++row;
      return row == end;
    };
    const auto epilogue = [&](int64_t row, int64_t vector, const V* u) {
      const int64_t unit = vector * L;
      if (this->active(row, t)) {
        point(t, row, unit, u);
      } else {
        store_raw(new_state + place(row, unit), load(old_state + place(row, unit)));
        store(this->template at<S>(problem->y, 1, t, row, unit), Raw<S>{}, this->shape.size - unit);
      }
    };
    for_each_product<A, Cell::kGates>(weights, old_state, this->stride, this->tiling, skip,
                                      epilogue);
  }

  RNNFAST_INLINE void point(int64_t t, int64_t row, int64_t unit, const V* u) {
    const int64_t size = this->shape.size;
    const int64_t count = size - unit;
    Values<V, Cell::kGates> p;
    Values<V, Cell::kCarried> state;
    Values<V, Cell::kSaved> saved;
    const S* from = this->template at<const S>(problem->p, Cell::kGates, t, row, unit);
    for (int i = 0; i < Cell::kGates; ++i) p.at[i] = load(from + i * size, count);
    for (int i = 0; i < Cell::kCarried; ++i) state.at[i] = load(carried_at(i, row, unit));
    const V h_prev = load(old_state + place(row, unit));
    const Raw<S> h = narrow<S>(Cell::forward(p.at, u, h_prev, state.at, saved.at));
    store(this->template at<S>(problem->y, 1, t, row, unit), h, count);
    store_raw(new_state + place(row, unit), widen<S>(h));
    for (int i = 0; i < Cell::kCarried; ++i) store_raw(carried_at(i, row, unit), state.at[i]);
    if constexpr (Cell::kSaved > 0) {
      S* to = this->template at<S>(problem->saved, Cell::kSaved, t, row, unit);
      for (int i = 0; i < Cell::kSaved; ++i) store(to + i * size, narrow<S>(saved.at[i]), count);
    }
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
  RNNFAST_INLINE int64_t du_place(int64_t row, int64_t unit) const {
    return row * du_stride + unit;
  }
  RNNFAST_INLINE A* dcarried_at(int index, int64_t row, int64_t unit) const {
    return dcarried + index * this->slice.count * this->stride + place(row, unit);
  }
  // The step at which BPTT enters the row: its carry is grad_h_n.
  RNNFAST_INLINE bool enters(int64_t row, int64_t t) const {
    return this->reverse() ? t == 0 : t == this->length(row) - 1;
  }

  void begin() {
    for (int64_t i = 0; i < this->slice.count * du_stride; ++i) old_du[i] = 0;
    for (int64_t row = 0; row < this->slice.count; ++row) {
      for (int64_t unit = 0; unit < this->shape.size; unit += L) {
        if constexpr (Cell::kDirectGradient) store_raw(direct + place(row, unit), V{});
        for (int i = 0; i < Cell::kCarried; ++i)
          store_raw(dcarried_at(i, row, unit),
                    this->state_or_zero(problem->grad_carried_n, i, row, unit));
      }
    }
  }

  RNNFAST_INLINE V carry(int64_t row, int64_t unit, const V* product) const {
    if constexpr (Cell::kDirectGradient) return product[0] + load(direct + place(row, unit));
    return product[0];
  }

  void step(int64_t t) {
    const auto skip = [&](int64_t row, int64_t end) {
      while (row < end && (!this->active(row, t) || enters(row, t))) ++row;
      return row == end;
    };
    const auto epilogue = [&](int64_t row, int64_t vector, const V* product) {
      const int64_t unit = vector * L;
      if (this->active(row, t)) {
        point(t, row, unit,
              enters(row, t) ? this->state_or_zero(problem->grad_h_n, 0, row, unit)
                             : carry(row, unit, product));
      } else {
        pass(t, row, unit);
      }
    };
    for_each_product<A, 1>(weights, old_du, du_stride, this->tiling, skip, epilogue);
  }

  // With several gates the rest of the last vector belongs to the next gate.
  RNNFAST_INLINE void keep_du(int64_t row, int64_t unit, int gate, V value) {
    A* to = new_du + du_place(row, gate * this->shape.size + unit);
    if constexpr (Cell::kGates == 1) {
      store_raw(to, value);
    } else {
      store(to, value, this->shape.size - unit);
    }
  }

  // A step outside the row's length: the gradient waits, nothing flows into p.
  RNNFAST_INLINE void pass(int64_t t, int64_t row, int64_t unit) {
    const int64_t size = this->shape.size;
    for (int i = 0; i < Cell::kGates; ++i) {
      keep_du(row, unit, i, load(old_du + du_place(row, i * size + unit), size - unit));
      store(this->template at<S>(problem->dp, Cell::kGates, t, row, unit + i * size), Raw<S>{},
            size - unit);
      if constexpr (Cell::kSplitGradient)
        store(this->template at<S>(problem->du, Cell::kGates, t, row, unit + i * size), Raw<S>{},
              size - unit);
    }
  }

  RNNFAST_INLINE V previous_state(int64_t t, int64_t row, int64_t unit) const {
    const bool first = this->reverse() ? t == this->length(row) - 1 : t == 0;
    if (first) return this->state_or_zero(problem->h0, 0, row, unit);
    return load(
        this->template at<const S>(problem->y, 1, this->reverse() ? t + 1 : t - 1, row, unit),
        this->shape.size - unit);
  }

  RNNFAST_INLINE void point(int64_t t, int64_t row, int64_t unit, V dh) {
    const int64_t size = this->shape.size;
    const int64_t count = size - unit;
    if (problem->grad_y.data != nullptr)
      dh += load(this->template at<const S>(problem->grad_y, 1, t, row, unit), count);
    const V h = load(this->template at<const S>(problem->y, 1, t, row, unit), count);
    V h_prev = {};
    if constexpr (Cell::kReadsPrevious) h_prev = previous_state(t, row, unit);
    Values<V, Cell::kSaved> saved;
    if constexpr (Cell::kSaved > 0) {
      const S* from = this->template at<const S>(problem->saved, Cell::kSaved, t, row, unit);
      for (int i = 0; i < Cell::kSaved; ++i) saved.at[i] = load(from + i * size, count);
    }
    Values<V, Cell::kCarried> state;
    for (int i = 0; i < Cell::kCarried; ++i) state.at[i] = load(dcarried_at(i, row, unit));
    Values<V, Cell::kGates> dp;
    Values<V, Cell::kSplitGradient ? Cell::kGates : 0> du;
    const V bypass = Cell::backward(dh, h, h_prev, saved.at, state.at, dp.at, du.at);
    if constexpr (Cell::kDirectGradient) store_raw(direct + place(row, unit), bypass);
    for (int i = 0; i < Cell::kCarried; ++i) store_raw(dcarried_at(i, row, unit), state.at[i]);
    for (int i = 0; i < Cell::kGates; ++i) {
      Raw<S> stored = narrow<S>(dp.at[i]);
      store(this->template at<S>(problem->dp, Cell::kGates, t, row, unit + i * size), stored,
            count);
      if constexpr (Cell::kSplitGradient) {
        stored = narrow<S>(du.at[i]);
        store(this->template at<S>(problem->du, Cell::kGates, t, row, unit + i * size), stored,
              count);
      }
      keep_du(row, unit, i, widen<S>(stored));
    }
  }

  void end() {
    if (problem->dh0 == nullptr && problem->dcarried0 == nullptr) return;
    const auto skip = [&](int64_t, int64_t) { return problem->dh0 == nullptr; };
    const auto epilogue = [&](int64_t row, int64_t vector, const V* product) {
      const int64_t unit = vector * L;
      const int64_t count = this->shape.size - unit;
      if (problem->dh0 != nullptr) {
        const V dh0 = this->length(row) > 0 ? carry(row, unit, product)
                                            : this->state_or_zero(problem->grad_h_n, 0, row, unit);
        store(this->template state<S>(problem->dh0, 0, row, unit), narrow<S>(dh0), count);
      }
      if (problem->dcarried0 != nullptr) {
        for (int i = 0; i < Cell::kCarried; ++i)
          store(this->template state<S>(problem->dcarried0, i, row, unit),
                narrow<S>(load(dcarried_at(i, row, unit))), count);
      }
    };
    for_each_product<A, 1>(weights, old_du, du_stride, this->tiling, skip, epilogue);
  }
};

// ---------------------------------------------------------------------------------------- launch

// One call: packs W_hh of every group, then runs the tasks. Run has pack(unit) and task(index).
template <class Run>
void launch(Run& run, int64_t pack_units, int64_t weights, const Plan& plan) {
  parallel_for(
      pack_units, weights < kWorthPackingTogether ? 1 : plan.threads,
      [](void* context, int64_t unit) { static_cast<Run*>(context)->pack(unit); }, &run);
  parallel_for(
      plan.groups * plan.slices, plan.threads,
      [](void* context, int64_t task) { static_cast<Run*>(context)->task(task); }, &run);
}

template <class Cell, class S>
struct ForwardRun {
  using A = Arithmetic<S>;
  const ForwardProblem& problem;
  Plan plan;
  PackedLayout<A> layout;
  A* panels;
  A* scratch;
  int64_t scratch_stride;
  int64_t stride;

  void pack(int64_t index) {
    const int64_t size = problem.shape.size;
    const int64_t group = index / layout.units;
    const int64_t unit = index % layout.units;
    const S* bias = static_cast<const S*>(problem.b_hh);
    pack_forward(
        static_cast<const S*>(problem.w_hh) + group * Cell::kGates * size * size,
        Cell::kRecurrentBias ? bias + group * Cell::kGates * size : nullptr, size, Cell::kGates,
        unit, panels + group * layout.group_stride() + unit * Cell::kGates * layout.panel_stride());
  }

  void task(int64_t index) {
    const Slice slice = make_slice(plan, problem.shape.batch, index);
    if (slice.count == 0) return;
    A* memory = scratch + index * scratch_stride;
    ForwardTask<Cell, S> work;
    work.shape = problem.shape;
    work.slice = slice;
    work.lengths = problem.lengths;
    work.tiling = make_tiling(slice.count, layout.units, Cell::kGates);
    work.stride = stride;
    work.problem = &problem;
    work.weights = layout.group(panels, slice.group);
    work.old_state = memory;
    work.new_state = memory + slice.count * stride;
    work.carried = memory + 2 * slice.count * stride;
    work.run();
  }
};

template <class Cell, class S>
void forward(const ForwardProblem& problem) {
  using A = Arithmetic<S>;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.size == 0) return;
  const Plan plan = make_plan(shape, Cell::kGates, problem.threads);
  const PackedLayout<A> layout = {shape.size, ceil_div(shape.size, kLanes<A>), Cell::kGates,
                                  Cell::kRecurrentBias};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t each =
      ForwardTask<Cell, S>::scratch_elements(ceil_div(shape.batch, plan.slices), stride);
  const int64_t packed = plan.groups * layout.group_stride();
  const Scratch memory(static_cast<std::size_t>(packed + plan.groups * plan.slices * each) *
                       sizeof(A));
  A* const panels = reinterpret_cast<A*>(memory.data());
  ForwardRun<Cell, S> run = {problem, plan, layout, panels, panels + packed, each, stride};
  launch(run, plan.groups * layout.units, packed, plan);
}

template <class Cell, class S>
struct BackwardRun {
  using A = Arithmetic<S>;
  const BackwardProblem& problem;
  Plan plan;
  PackedLayout<A> layout;
  A* panels;
  A* scratch;
  int64_t scratch_stride;
  int64_t stride;
  int64_t du_stride;

  void pack(int64_t index) {
    const int64_t size = problem.shape.size;
    const int64_t group = index / layout.units;
    const int64_t unit = index % layout.units;
    pack_backward(static_cast<const S*>(problem.w_hh) + group * Cell::kGates * size * size, size,
                  Cell::kGates, unit,
                  panels + group * layout.group_stride() + unit * layout.panel_stride());
  }

  void task(int64_t index) {
    const Slice slice = make_slice(plan, problem.shape.batch, index);
    if (slice.count == 0) return;
    A* memory = scratch + index * scratch_stride;
    BackwardTask<Cell, S> work;
    work.shape = problem.shape;
    work.slice = slice;
    work.lengths = problem.lengths;
    work.tiling = make_tiling(slice.count, layout.units, 1);
    work.stride = stride;
    work.problem = &problem;
    work.weights = layout.group(panels, slice.group);
    work.du_stride = du_stride;
    work.old_du = memory;
    work.new_du = memory + slice.count * du_stride;
    work.dcarried = memory + 2 * slice.count * du_stride;
    work.direct = work.dcarried + Cell::kCarried * slice.count * stride;
    work.run();
  }
};

template <class Cell, class S>
void backward(const BackwardProblem& problem) {
  using A = Arithmetic<S>;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.size == 0) return;
  const Plan plan = make_plan(shape, Cell::kGates, problem.threads);
  const PackedLayout<A> layout = {Cell::kGates * shape.size, ceil_div(shape.size, kLanes<A>), 1,
                                  false};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t du_stride = row_stride<A>(Cell::kGates * shape.size);
  const int64_t each = BackwardTask<Cell, S>::scratch_elements(ceil_div(shape.batch, plan.slices),
                                                               stride, du_stride);
  const int64_t packed = plan.groups * layout.group_stride();
  const Scratch memory(static_cast<std::size_t>(packed + plan.groups * plan.slices * each) *
                       sizeof(A));
  A* const panels = reinterpret_cast<A*>(memory.data());
  BackwardRun<Cell, S> run = {problem,         plan, layout, panels,
                              panels + packed, each, stride, du_stride};
  launch(run, plan.groups * layout.units, packed, plan);
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
