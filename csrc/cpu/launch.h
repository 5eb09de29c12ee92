// One call of a kernel: memory, threads, and what each thread does in which order.
#pragma once

#include "point_gradients.h"
#include "recurrence.h"

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
      if (slice.count > 0) self.work(slice, crew, member, scratch + task * task_elements);
    }
  }
};

// P: the type of p in memory, S where it was given, the arithmetic type where it is computed here.
template <class Cell, class S, class P>
struct ForwardRun : Call<S> {
  using typename Call<S>::A;
  const ForwardProblem& problem;
  int64_t stride;
  PackedLayout<A> input_layout;
  int64_t chunk;       // steps that are projected together
  int64_t x_elements;  // of each thread's copy of inputs
  A* input_panels = nullptr;
  A* inputs = nullptr;

  bool projects() const { return problem.w_ih != nullptr; }
  int64_t all_elements(const Plan& plan) const {
    const int64_t more = plan.groups * input_layout.group_stride() + plan.threads * x_elements;
    return this->elements() + (projects() ? more : 0);
  }
  void place(const Scratch& memory) {
    Call<S>::place(memory);
    input_panels = this->panels + this->elements();
    inputs = input_panels + this->plan.groups * input_layout.group_stride();
  }

  void pack(int64_t index) const {
    const int64_t size = this->shape.size;
    const int64_t rows = Cell::kGates * size;
    const int64_t group = index / this->layout.units;
    const int64_t unit = index % this->layout.units;
    const auto of_group = [&](const void* data, int64_t values) {
      return data != nullptr ? static_cast<const S*>(data) + group * rows * values : nullptr;
    };
    const S* const b_hh = of_group(problem.b_hh, 1);
    pack_rows(of_group(problem.w_hh, size), Cell::kRecurrentBias ? b_hh : nullptr,
              static_cast<const S*>(nullptr), size, size, Cell::kGates, unit,
              this->panels + group * this->layout.group_stride() +
                  unit * Cell::kGates * this->layout.panel_stride());
    if (projects())
      pack_rows(of_group(problem.w_ih, problem.input_size), of_group(problem.b_ih, 1),
                Cell::kRecurrentBias ? nullptr : b_hh, problem.input_size, size, Cell::kGates, unit,
                input_panels + group * input_layout.group_stride() +
                    unit * Cell::kGates * input_layout.panel_stride());
  }

  void work(const Slice& slice, const Crew& crew, const Member& member, A* memory) const {
    ForwardTask<Cell, S, P> task;
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
    task.chunk = chunk;
    if (projects()) {
      task.input_weights = input_layout.group(input_panels, slice.group);
      task.inputs = inputs + member.index * x_elements;
      task.projected = memory + (2 + Cell::kCarried) * slice.count * stride;
    }
    task.run();
  }
};

template <class Cell, class S, class P>
void forward(const ForwardProblem& problem) {
  using A = Arithmetic<S>;
  using Task = ForwardTask<Cell, S, P>;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.size == 0) return;
  const Plan plan = make_plan(shape, Cell::kGates, problem.threads);
  const int64_t units = ceil_div(shape.size, kLanes<A>);
  const PackedLayout<A> layout = {shape.size, units, Cell::kGates, Cell::kRecurrentBias};
  const PackedLayout<A> input_layout = {problem.input_size, units, Cell::kGates,
                                        problem.b_ih != nullptr};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t chunk = problem.w_ih != nullptr ? Task::chunk_steps(shape.steps, rows) : 0;
  const int64_t each = Task::scratch_elements(rows, stride, chunk, shape.size);
  ForwardRun<Cell, S, P> run = {
      {shape, plan, layout, each, nullptr, nullptr}, problem, stride, input_layout, chunk,
      kInputRows * row_stride<A>(problem.input_size)};
  const Scratch memory(static_cast<std::size_t>(run.all_elements(plan)) * sizeof(A));
  run.place(memory);
  run_team(
      plan.threads,
      [](void* context, const Member& member) {
        auto& run = *static_cast<ForwardRun<Cell, S, P>*>(context);
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
  PointGradients<Cell, S> gradients;

  void pack(int64_t index) const {
    const int64_t size = this->shape.size;
    const int64_t group = index / this->layout.units;
    const int64_t unit = index % this->layout.units;
    pack_columns(
        static_cast<const S*>(problem.w_hh) + group * this->layout.inner * size, this->layout.inner,
        size, unit,
        this->panels + group * this->layout.group_stride() + unit * this->layout.panel_stride());
  }

  void work(const Slice& slice, const Crew& crew, const Member&, A* memory) const {
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
    PointGradients<Cell, S>{problem, 1}.clear();
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
  const std::size_t after = static_cast<std::size_t>(run.gradients.elements()) * sizeof(A);
  const Scratch memory(loop > after ? loop : after);  // one use of it after the other
  run.place(memory);
  run.gradients.place(memory);
  run_team(
      plan.threads,
      [](void* context, const Member& member) {
        auto& run = *static_cast<BackwardRun<Cell, S>*>(context);
        run.run(run, member);
        if (!run.gradients.wanted()) return;
        meet(member);
        run.gradients.run(member);
      },
      &run);
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
