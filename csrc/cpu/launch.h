// One call of a kernel: memory, threads, and what each thread does in which order.
#pragma once

#include "backward.h"
#include "forward.h"
#include "point_gradients.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

RNNFAST_INLINE void meet(const Member& member) {
  if (member.count > 1) member.barriers[0].wait(member.count);
}

// For the threads that there are; which ones is asked where more than one is worth it.
template <class A>
RNNFAST_INLINE Plan plan_call(const Shape& shape, int gates, int wanted) {
  Plan plan = make_plan(shape, gates, kLanes<A>, wanted);
  if (plan.threads == 1) return plan;
  const Threads usable = usable_threads(wanted);
  if (usable.pool == 0)
    plan = make_plan(shape, gates, kLanes<A>, usable.count, RNNFAST_WORTH_STARTING);
  plan.pool = usable.pool;
  return plan;
}

// Of [T, B, width], in one block.
template <class S>
RNNFAST_INLINE std::size_t bytes_of(const Shape& shape, int64_t width) {
  return static_cast<std::size_t>(shape.steps * shape.batch * width) * sizeof(S);
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
    return make_tiling(slice.count, first, end - first, gates, layout.sums.chains);
  }

  // Of each task: the threads may be fewer than were planned for.
  int parts(const Member& member) const {
    const int64_t fit = member.count / plan.tasks();
    return static_cast<int>(fit < 1 ? 1 : fit < plan.parts ? fit : plan.parts);
  }

  template <class Run>
  void run(Run& self, const Member& member) const {
    // Neighbouring panels by one thread: where it will use them, they are in its cache.
    const int64_t all = plan.groups * layout.units;
    const int64_t end = part_begin(all, member.count, member.index + 1);
    for (int64_t i = part_begin(all, member.count, member.index); i < end; ++i) self.pack(i);
    meet(member);
    const int parts = this->parts(member);
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
template <class Cell, class S, class P, bool kNorm>
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
    ForwardTask<Cell, S, P, kNorm> task;
    task.shape = this->shape;
    task.slice = slice;
    task.crew = crew;
    task.lengths = problem.lengths;
    task.reset = problem.reset;
    task.tiling = this->tiling(slice, crew, Cell::kGates);
    task.stride = stride;
    task.problem = &problem;
    task.weights = this->layout.group(this->panels, slice.group);
    task.old_state = memory;
    task.new_state = memory + slice.count * stride;
    task.carried = memory + 2 * slice.count * stride;
    memory = task.carried + Cell::kCarried * slice.count * stride;
    if constexpr (kNorm) {
      task.preact = memory;
      memory += slice.count * stride;
    }
    task.chunk = chunk;
    if (projects()) {
      task.input_weights = input_layout.group(input_panels, slice.group);
      task.inputs = inputs + member.index * x_elements;
      task.projected = memory;
    }
    task.run();
  }
};

template <class Cell, class S, class P, bool kNorm = false>
void forward(const ForwardProblem& problem) {
  using A = Arithmetic<S>;
  using Task = ForwardTask<Cell, S, P, kNorm>;
  using Run = ForwardRun<Cell, S, P, kNorm>;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.size == 0) return;
  const Plan plan = plan_call<A>(shape, Cell::kGates, problem.threads);
  const int64_t units = ceil_div(shape.size, kLanes<A>);
  const PackedLayout<A> layout = {shape.size, units, Cell::kGates, Cell::kRecurrentBias,
                                  sums_for_batch<A>(shape.size, shape.batch)};
  const PackedLayout<A> input_layout = {
      problem.input_size, units, Cell::kGates, problem.b_ih != nullptr,
      sums_for_batch<A>(problem.input_size, shape.steps * shape.batch)};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t chunk = problem.w_ih != nullptr ? Task::chunk_steps(shape.steps, rows) : 0;
  const int64_t each = Task::scratch_elements(rows, stride, chunk, shape.size);
  Run run = {{shape, plan, layout, each, nullptr, nullptr}, problem, stride, input_layout, chunk,
             kInputRows * row_stride<A>(problem.input_size)};
  const Scratch memory(static_cast<std::size_t>(run.all_elements(plan)) * sizeof(A));
  run.place(memory);
  const int64_t width = shape.directions * shape.heads * shape.size;
  expect_to_fill(problem.y.data, bytes_of<S>(shape, width));
  expect_to_fill(problem.ahat.data, bytes_of<S>(shape, width));
  run_team(
      {plan.threads, plan.pool},
      [](void* context, const Member& member) {
        auto& run = *static_cast<Run*>(context);
        run.run(run, member);
      },
      &run);
}

template <class Cell, class S, bool kRows>
struct BackwardRun : Call<S> {
  using typename Call<S>::A;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const BackwardProblem& problem;
  int64_t stride;
  int64_t du_stride;
  PointGradients<Cell, S> gradients;
  // With kRows, in scratch as well:
  A* norm_gradients = nullptr;  // [B, groups, 2] rows
  A* dn = nullptr;              // a row for each thread
  double* measured = nullptr;   // [tasks, parts] records of some rows and some units

  int64_t norm_elements() const {
    const bool norm = problem.gamma != nullptr;
    return norm ? whole_blocks<A>(this->shape.batch * this->plan.groups * 2 * stride) : 0;
  }
  // Of one record, numbers; and its rows of the batch, or one.
  int64_t record_numbers() const {
    if (problem.record == nullptr) return 0;
    const int64_t rows = problem.per_sample ? ceil_div(this->shape.batch, this->plan.slices) : 1;
    return whole_blocks<double>(this->shape.steps * rows * kFields);
  }
  int64_t records() const { return this->plan.tasks() * this->plan.parts; }
  double* record_of(int64_t task, int64_t part) const {
    return measured + (task * this->plan.parts + part) * record_numbers();
  }
  int64_t all_elements() const {
    if constexpr (!kRows) return this->elements();
    const int64_t rows = whole_blocks<A>(this->plan.threads * stride);
    constexpr int64_t kPerNumber = static_cast<int64_t>(sizeof(double) / sizeof(A));
    return whole_blocks<A>(this->elements()) + norm_elements() + rows +
           records() * record_numbers() * kPerNumber;
  }
  void place(const Scratch& memory) {
    Call<S>::place(memory);
    if constexpr (kRows) {
      norm_gradients = this->panels + whole_blocks<A>(this->elements());
      dn = norm_gradients + norm_elements();
      measured = reinterpret_cast<double*>(dn + whole_blocks<A>(this->plan.threads * stride));
    }
  }

  void pack(int64_t index) const {
    const int64_t size = this->shape.size;
    const int64_t group = index / this->layout.units;
    const int64_t unit = index % this->layout.units;
    pack_columns(
        static_cast<const S*>(problem.w_hh) + group * this->layout.inner * size, this->layout.inner,
        size, unit,
        this->panels + group * this->layout.group_stride() + unit * this->layout.panel_stride());
  }

  void work(const Slice& slice, const Crew& crew, const Member& member, A* memory) const {
    BackwardTask<Cell, S, kRows> task;
    task.shape = this->shape;
    task.slice = slice;
    task.crew = crew;
    task.lengths = problem.lengths;
    task.reset = problem.reset;
    task.tiling = this->tiling(slice, crew, 1);
    task.stride = stride;
    task.problem = &problem;
    task.weights = this->layout.group(this->panels, slice.group);
    task.du_stride = du_stride;
    task.old_du = memory;
    task.new_du = memory + slice.count * du_stride;
    task.dcarried = memory + 2 * slice.count * du_stride;
    task.direct = task.dcarried + Cell::kCarried * slice.count * stride;
    if constexpr (kRows) {
      task.carried_dh = task.direct + (Cell::kDirectGradient ? slice.count * stride : 0);
      task.norm_gradients = norm_gradients;
      task.dn = dn + member.index * stride;
      task.measured = nullptr;
      if (problem.record != nullptr) {
        task.measured = record_of(slice.task, crew.index);
        fill_zero<double>(task.measured, record_numbers());
      }
    }
    task.run();
  }

  // Once all tasks are done: what they have left, added up. Every member of the team calls it.
  void sum(const Member& member) const {
    if (problem.dgamma != nullptr) {
      const int64_t all = this->plan.groups * this->layout.units;
      const int64_t end = part_begin(all, member.count, member.index + 1);
      for (int64_t i = part_begin(all, member.count, member.index); i < end; ++i)
        sum_norm(i / this->layout.units, i % this->layout.units * L);
    }
    if (problem.record == nullptr) return;
    const int64_t end = part_begin(this->shape.steps, member.count, member.index + 1);
    for (int64_t t = part_begin(this->shape.steps, member.count, member.index); t < end; ++t)
      for (int64_t d = 0; d < this->shape.directions; ++d) sum_record(d, t, this->parts(member));
  }

 private:
  void sum_norm(int64_t group, int64_t unit) const {
    V sum[2] = {}, lost[2] = {};
    for (int64_t b = 0; b < this->shape.batch; ++b) {
      for (int i = 0; i < 2; ++i) {
        const V part =
            load(norm_gradients + ((b * this->plan.groups + group) * 2 + i) * stride + unit);
        add_exactly(part, sum[i], lost[i]);
      }
    }
    void* const to[2] = {problem.dgamma, problem.dbeta};
    for (int i = 0; i < 2; ++i)
      store(static_cast<A*>(to[i]) + group * this->shape.size + unit, with_lost(sum[i], lost[i]),
            this->shape.size - unit);
  }

  void sum_record(int64_t direction, int64_t t, int parts) const {
    const int64_t rows = problem.per_sample ? this->shape.batch : 1;
    double* const to = problem.record + (direction * this->shape.steps + t) * rows * kFields;
    for (int64_t i = 0; i < rows * kFields; ++i) to[i] = 0;
    const int64_t first_task = direction * this->shape.heads * this->plan.slices;
    for (int64_t i = 0; i < this->shape.heads * this->plan.slices; ++i) {
      const Slice slice = make_slice(this->plan, this->shape.batch, first_task + i);
      const int64_t here = problem.per_sample ? slice.count : 1;
      for (int part = 0; slice.count > 0 && part < parts; ++part) {
        const double* const from = record_of(slice.task, part) + t * here * kFields;
        for (int64_t row = 0; row < here; ++row) {
          double* const sums = to + ((problem.per_sample ? slice.first : 0) + row) * kFields;
          for (int field = 0; field < kFields; ++field) {
            const double value = from[row * kFields + field];
            sums[field] = field == kStateMax ? larger(sums[field], value) : sums[field] + value;
          }
        }
      }
    }
  }
};

template <class Cell, class S, bool kRows = false>
void backward(const BackwardProblem& problem) {
  using A = Arithmetic<S>;
  using Task = BackwardTask<Cell, S, kRows>;
  using Run = BackwardRun<Cell, S, kRows>;
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.size == 0) {
    PointGradients<Cell, S>{problem, 1}.clear();
    const int64_t points = shape.directions * shape.steps * (problem.per_sample ? shape.batch : 1);
    fill_zero<double>(problem.record, points * kFields);
    return;
  }
  const Plan plan = plan_call<A>(shape, Cell::kGates, problem.threads);
  const PackedLayout<A> layout = {Cell::kGates * shape.size, ceil_div(shape.size, kLanes<A>), 1,
                                  false, usual_sums<A>(Cell::kGates * shape.size)};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t du_stride = row_stride<A>(Cell::kGates * shape.size);
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t each = Task::scratch_elements(rows, stride, du_stride);
  Run run = {{shape, plan, layout, each, nullptr, nullptr},
             problem,
             stride,
             du_stride,
             {problem, plan.threads}};
  const std::size_t loop = static_cast<std::size_t>(run.all_elements()) * sizeof(A);
  const std::size_t after = static_cast<std::size_t>(run.gradients.elements()) * sizeof(A);
  const Scratch memory(loop > after ? loop : after);  // one use of it after the other
  run.place(memory);
  run.gradients.place(memory);
  const int64_t width = shape.directions * shape.heads * Cell::kGates * shape.size;
  expect_to_fill(problem.dp.data, bytes_of<S>(shape, width));
  if (problem.dx.data != problem.dp.data)
    expect_to_fill(problem.dx.data, bytes_of<S>(shape, problem.input_size));
  run_team(
      {plan.threads, plan.pool},
      [](void* context, const Member& member) {
        const FlushSubnormals flush;
        auto& run = *static_cast<Run*>(context);
        run.run(run, member);
        if constexpr (kRows) {
          meet(member);
          run.sum(member);
        }
        if (!run.gradients.wanted()) return;
        meet(member);
        run.gradients.run(member);
      },
      &run);
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
