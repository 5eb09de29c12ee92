// One call of a kernel: memory, threads, and what each thread does in which order.
#pragma once

#include "recurrence.h"
#include "weight_gradient.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

RNNFAST_INLINE void meet(const Member& member) {
  if (member.count > 1) member.barriers[0].wait(member.count);
}

// What forward and backward have in common. Run has pack(index), for one vector of units of one
// group, and work(slice, crew, scratch), the time loop; the threads meet in between.
template <class S>
struct Call {
  using A = Arithmetic<S>;
  const Shape& shape;
  Plan plan;
  PackedLayout<A> layout;
  int64_t task_elements;  // of scratch
  A* panels;
  A* scratch;

  int64_t packed_elements() const { return plan.groups * layout.group_stride(); }
  int64_t elements() const { return packed_elements() + plan.tasks() * task_elements; }

  void place(const Scratch& memory) {
    panels = reinterpret_cast<A*>(memory.data());
    scratch = panels + packed_elements();
  }

  // The part of the slice's products that one member of the crew computes.
  Tiling tiling(const Slice& slice, const Crew& crew, int gates) const {
    const int64_t first = part_begin(layout.units, crew.count, crew.index);
    const int64_t end = part_begin(layout.units, crew.count, crew.index + 1);
    return make_tiling(slice.count, first, end - first, gates);
  }

  template <class Run>
  void run(Run& self, const Member& member) const {
    // Neighbouring panels by one thread: where it will use them, they are in its cache.
    const int64_t all = plan.groups * layout.units;
    const int64_t end = part_begin(all, member.count, member.index + 1);
    for (int64_t i = part_begin(all, member.count, member.index); i < end; ++i) self.pack(i);
    meet(member);
    // The threads may be fewer than were planned for.
    const int64_t fit = member.count / plan.tasks();
    const int parts = static_cast<int>(fit < 1 ? 1 : fit < plan.parts ? fit : plan.parts);
    const int crews = member.count / parts;
    const int number = member.index / parts;
    if (number >= crews) return;
    const Crew crew = {member.index % parts, parts,
                       parts > 1 ? member.barriers + 1 + number : nullptr};
    for (int64_t task = number; task < plan.tasks(); task += crews) {
      const Slice slice = make_slice(plan, shape.batch, task);
      if (slice.count > 0) self.work(slice, crew, scratch + task * task_elements);
    }
  }
};

template <class Cell, class S>
struct ForwardRun : Call<S> {
  using typename Call<S>::A;
  const ForwardProblem& problem;
  int64_t stride;

  void pack(int64_t index) const {
    const int64_t size = this->shape.size;
    const int64_t group = index / this->layout.units;
    const int64_t unit = index % this->layout.units;
    const S* bias = static_cast<const S*>(problem.b_hh);
    pack_forward(static_cast<const S*>(problem.w_hh) + group * Cell::kGates * size * size,
                 Cell::kRecurrentBias ? bias + group * Cell::kGates * size : nullptr, size,
                 Cell::kGates, unit,
                 this->panels + group * this->layout.group_stride() +
                     unit * Cell::kGates * this->layout.panel_stride());
  }

  void work(const Slice& slice, const Crew& crew, A* memory) const {
    ForwardTask<Cell, S> task;
    task.shape = this->shape;
    task.slice = slice;
    task.crew = crew;
    task.lengths = problem.lengths;
    task.tiling = this->tiling(slice, crew, Cell::kGates);
    task.stride = stride;
    task.problem = &problem;
    task.weights = this->layout.group(this->panels, slice.group);
    task.old_state = memory;
    task.new_state = memory + slice.count * stride;
    task.carried = memory + 2 * slice.count * stride;
    task.run();
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
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t each = ForwardTask<Cell, S>::scratch_elements(rows, stride);
  ForwardRun<Cell, S> run = {{shape, plan, layout, each, nullptr, nullptr}, problem, stride};
  const Scratch memory(static_cast<std::size_t>(run.elements()) * sizeof(A));
  run.place(memory);
  run_team(
      plan.threads,
      [](void* context, const Member& member) {
        auto& run = *static_cast<ForwardRun<Cell, S>*>(context);
        run.run(run, member);
      },
      &run);
}

template <class Cell, class S>
struct BackwardRun : Call<S> {
  using typename Call<S>::A;
  const BackwardProblem& problem;
  int64_t stride;
  int64_t du_stride;
  WeightGradient<Cell, S> weight_gradient;

  void pack(int64_t index) const {
    const int64_t size = this->shape.size;
    const int64_t group = index / this->layout.units;
    const int64_t unit = index % this->layout.units;
    pack_backward(
        static_cast<const S*>(problem.w_hh) + group * Cell::kGates * size * size, size,
        Cell::kGates, unit,
        this->panels + group * this->layout.group_stride() + unit * this->layout.panel_stride());
  }

  void work(const Slice& slice, const Crew& crew, A* memory) const {
    BackwardTask<Cell, S> task;
    task.shape = this->shape;
    task.slice = slice;
    task.crew = crew;
    task.lengths = problem.lengths;
    task.tiling = this->tiling(slice, crew, 1);
    task.stride = stride;
    task.problem = &problem;
    task.weights = this->layout.group(this->panels, slice.group);
    task.du_stride = du_stride;
    task.old_du = memory;
    task.new_du = memory + slice.count * du_stride;
    task.dcarried = memory + 2 * slice.count * du_stride;
    task.direct = task.dcarried + Cell::kCarried * slice.count * stride;
    task.run();
  }
};

template <class Cell, class S>
void backward(const BackwardProblem& problem) {
  using A = Arithmetic<S>;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.size == 0) {
    WeightGradient<Cell, S>::clear(problem);
    return;
  }
  const Plan plan = make_plan(shape, Cell::kGates, problem.threads);
  const PackedLayout<A> layout = {Cell::kGates * shape.size, ceil_div(shape.size, kLanes<A>), 1,
                                  false};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t du_stride = row_stride<A>(Cell::kGates * shape.size);
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t each = BackwardTask<Cell, S>::scratch_elements(rows, stride, du_stride);
  BackwardRun<Cell, S> run = {{shape, plan, layout, each, nullptr, nullptr},
                              problem,
                              stride,
                              du_stride,
                              {problem, plan.threads}};
  const std::size_t loop = static_cast<std::size_t>(run.elements()) * sizeof(A);
  const std::size_t after = static_cast<std::size_t>(run.weight_gradient.elements()) * sizeof(A);
  const Scratch memory(loop > after ? loop : after);  // one use of it after the other
  run.place(memory);
  run.weight_gradient.place(memory);
  run_team(
      plan.threads,
      [](void* context, const Member& member) {
        auto& run = *static_cast<BackwardRun<Cell, S>*>(context);
        run.run(run, member);
        if (run.problem.dw_hh == nullptr) return;
        meet(member);
        run.weight_gradient.run(member);
      },
      &run);
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
