// One call of a kernel: memory, threads, and what each thread does in which order.
#pragma once

#include "backward.h"
#include "emitted_edges.h"
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

// Bytes of a contiguous tensor [T, B, width].
template <class S>
RNNFAST_INLINE std::size_t bytes_of(const Shape& shape, int64_t width) {
  return static_cast<std::size_t>(shape.steps * shape.batch * width) * sizeof(S);
}

// Base of forward's and backward's launch. Run has pack(index), for one vector of units of one
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

  // Parts of each task: there may be fewer threads than the plan expected.
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

template <class S>
struct ForwardRun : Call<S> {
  using typename Call<S>::A;
  const ForwardProblem& problem;
  const CellPoints<S>& cell;
  int64_t stride;
  PackedLayout<A> input_layout;
  int64_t chunk;       // steps that are projected together
  int64_t x_elements;  // of each thread's copy of inputs
  A* input_panels = nullptr;
  A* inputs = nullptr;
  A* normalized = nullptr;  // with layer norm: a few rows of each gate for each thread
  A* absent = nullptr;

  const CellFacts& facts() const { return cell.facts; }
  bool projects() const { return problem.w_ih != nullptr; }
  bool norms() const { return problem.gamma != nullptr; }
  int64_t gate_rows() const { return facts().gates * stride; }
  int64_t all_elements() const {
    const int64_t inputs =
        this->plan.groups * input_layout.group_stride() + this->plan.threads * x_elements;
    return whole_blocks<A>(this->elements() + (projects() ? inputs : 0)) +
           (norms() ? (kFewRows * this->plan.threads + 1) * whole_blocks<A>(gate_rows()) : 0);
  }
  void place(const Scratch& memory) {
    Call<S>::place(memory);
    input_panels = this->panels + this->elements();
    inputs = input_panels + this->plan.groups * input_layout.group_stride();
    if (!norms()) return;
    absent = this->panels + all_elements() - whole_blocks<A>(gate_rows());
    normalized = absent - kFewRows * this->plan.threads * whole_blocks<A>(gate_rows());
    for (int64_t i = 0; i < gate_rows(); ++i) absent[i] = -A(0);
  }

  void pack(int64_t index) const {
    const int64_t size = this->shape.size;
    const int gates = facts().gates;
    const int64_t group = index / this->layout.units;
    const int64_t unit = index % this->layout.units;
    const auto of_group = [&](const void* data, int64_t values) {
      return data != nullptr ? static_cast<const S*>(data) + group * gates * size * values
                             : nullptr;
    };
    const S* const b_hh = of_group(problem.b_hh, 1);
    pack_rows(of_group(problem.w_hh, size), this->layout.bias ? b_hh : nullptr,
              static_cast<const S*>(nullptr), size, size, gates, unit,
              this->panels + group * this->layout.group_stride() +
                  unit * gates * this->layout.panel_stride());
    if (projects())
      pack_rows(of_group(problem.w_ih, problem.input_size), of_group(problem.b_ih, 1),
                this->layout.bias ? nullptr : b_hh, problem.input_size, size, gates, unit,
                input_panels + group * input_layout.group_stride() +
                    unit * gates * input_layout.panel_stride());
  }

  static int unrounded(const CellFacts& facts) {
    return sizeof(S) != sizeof(A) && facts.direct_gradient ? 1 : 0;
  }

  // Elements of one task's scratch.
  static int64_t of_task(const CellFacts& facts, bool norms, int64_t rows, int64_t stride,
                         int64_t projected) {
    const int64_t planes = 2 + facts.carried + unrounded(facts) + (norms ? facts.gates : 0);
    return whole_blocks<A>(planes * rows * stride + rows * projected);
  }

  void work(const Slice& slice, const Crew& crew, const Member& member, A* memory) const {
    ForwardTask<S> task;
    task.cell = &cell;
    task.shape = this->shape;
    task.slice = slice;
    task.crew = crew;
    task.lengths = problem.lengths;
    task.reset = problem.reset;
    task.tiling = this->tiling(slice, crew, facts().gates);
    task.stride = stride;
    task.problem = &problem;
    task.weights = this->layout.group(this->panels, slice.group);
    const int64_t plane = slice.count * stride;
    task.old_state = memory;
    task.new_state = memory + plane;
    task.carried = memory + 2 * plane;
    task.unrounded = task.carried + facts().carried * plane;
    memory = task.unrounded + unrounded(facts()) * plane;
    task.preact = memory;
    if (norms()) memory += slice.count * gate_rows();
    task.normalized = normalized + kFewRows * member.index * whole_blocks<A>(gate_rows());
    task.absent = absent;
    task.chunk = chunk;
    if (projects()) {
      task.input_weights = input_layout.group(input_panels, slice.group);
      task.inputs = inputs + member.index * x_elements;
      task.projected = memory;
    }
    task.run();
  }
};

template <class S>
void forward(const CellPoints<S>& cell, const ForwardProblem& problem) {
  using A = Arithmetic<S>;
  using Run = ForwardRun<S>;
  const Shape& shape = problem.shape;
  const CellFacts& facts = cell.facts;
  if (shape.batch == 0 || shape.size == 0) return;
  const Plan plan = plan_call<A>(shape, facts.gates, problem.threads);
  const int64_t units = ceil_div(shape.size, kLanes<A>);
  const PackedLayout<A> layout = {shape.size, units, facts.gates,
                                  facts.recurrent_bias && problem.b_hh != nullptr,
                                  sums_for_batch<A>(shape.size, shape.batch)};
  const PackedLayout<A> input_layout = {
      problem.input_size, units, facts.gates, problem.b_ih != nullptr,
      sums_for_batch<A>(problem.input_size, shape.steps * shape.batch)};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t chunk =
      problem.w_ih != nullptr ? ForwardTask<S>::chunk_steps(shape.steps, rows) : 0;
  const int64_t each = Run::of_task(facts, problem.gamma != nullptr, rows, stride,
                                    chunk * row_stride<A>(facts.gates * shape.size));
  Run run = {
      {shape, plan, layout, each, nullptr, nullptr}, problem, cell, stride, input_layout, chunk,
      kInputRows * row_stride<A>(problem.input_size)};
  const Scratch memory(static_cast<std::size_t>(run.all_elements()) * sizeof(A));
  run.place(memory);
  const int64_t width = shape.directions * shape.heads * shape.size;
  expect_to_fill(problem.y.data, bytes_of<S>(shape, width));
  expect_to_fill(problem.saved.data, bytes_of<S>(shape, facts.saved * width));
  expect_to_fill(problem.cells.data, bytes_of<S>(shape, width));
  expect_to_fill(problem.ahat.data, bytes_of<S>(shape, facts.gates * width));
  run_team(
      {plan.threads, plan.pool},
      [](void* context, const Member& member) {
        auto& run = *static_cast<Run*>(context);
        run.run(run, member);
      },
      &run);
}

template <class S>
struct BackwardRun : Call<S> {
  using typename Call<S>::A;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const BackwardProblem& problem;
  const CellPoints<S>& cell;
  int64_t stride;
  int64_t du_stride;
  PointGradients<S> gradients;
  // In scratch as well:
  A* dparameters = nullptr;     // [B, groups, parameters] rows
  A* norm_gradients = nullptr;  // [B, groups, 2, gates] rows
  A* own_dh = nullptr;          // two times a few rows for each thread
  double* measured = nullptr;   // [tasks, parts] records of some rows and some units

  const CellFacts& facts() const { return cell.facts; }
  bool norms() const { return problem.gamma != nullptr; }
  static bool whole_rows(const BackwardProblem& problem) {
    return problem.gamma != nullptr || problem.record != nullptr || problem.clip < __builtin_inf();
  }
  int64_t rows_of_all(int64_t values) const {
    return whole_blocks<A>(this->shape.batch * this->plan.groups * values * stride);
  }
  int64_t own_rows() const { return whole_blocks<A>(2 * kFewRows * this->plan.threads * stride); }
  int64_t norm_rows() const { return norms() ? 2 * facts().gates : 0; }
  // How many numbers one record has, over its rows of the batch or over one.
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
    constexpr int64_t kPerNumber = static_cast<int64_t>(sizeof(double) / sizeof(A));
    return whole_blocks<A>(this->elements()) + rows_of_all(facts().parameters) +
           rows_of_all(norm_rows()) + own_rows() + records() * record_numbers() * kPerNumber;
  }
  void place(const Scratch& memory) {
    Call<S>::place(memory);
    dparameters = this->panels + whole_blocks<A>(this->elements());
    norm_gradients = dparameters + rows_of_all(facts().parameters);
    own_dh = norm_gradients + rows_of_all(norm_rows());
    measured = reinterpret_cast<double*>(own_dh + own_rows());
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

  static int totals(const CellFacts& facts, const BackwardProblem& problem) {
    return problem.record != nullptr && facts.carried > 0 && !facts.emits ? 1 : 0;
  }

  // Elements of one task's scratch.
  static int64_t of_task(const CellFacts& facts, const BackwardProblem& problem, int64_t rows,
                         int64_t stride, int64_t du_stride) {
    const int64_t dn = problem.gamma != nullptr ? facts.gates : 0;
    const int64_t others = (facts.direct_gradient ? 1 : 0) + 2 * facts.carried + dn +
                           (whole_rows(problem) ? 1 : 0) + totals(facts, problem);
    return whole_blocks<A>(rows * (2 * du_stride + others * stride));
  }

  void work(const Slice& slice, const Crew& crew, const Member& member, A* memory) const {
    BackwardTask<S> task;
    task.cell = &cell;
    task.shape = this->shape;
    task.slice = slice;
    task.crew = crew;
    task.lengths = problem.lengths;
    task.reset = problem.reset;
    task.tiling = this->tiling(slice, crew, 1);
    task.stride = stride;
    task.problem = &problem;
    task.edges = &gradients.edges;
    task.weights = this->layout.group(this->panels, slice.group);
    task.du_stride = du_stride;
    const int64_t plane = slice.count * stride;
    task.old_du = memory;
    task.new_du = memory + slice.count * du_stride;
    task.old_dcarried = memory + 2 * slice.count * du_stride;
    task.new_dcarried = task.old_dcarried + facts().carried * plane;
    task.direct = task.new_dcarried + facts().carried * plane;
    task.dparameters = dparameters;
    task.own_dh = own_dh + 2 * kFewRows * member.index * stride;
    task.whole_rows = whole_rows(problem);
    task.carried_dh = task.direct + (facts().direct_gradient ? plane : 0);
    memory = task.carried_dh + (task.whole_rows ? plane : 0);
    task.total = totals(facts(), problem) > 0 ? memory : nullptr;
    task.dn = memory + totals(facts(), problem) * plane;
    task.norm_gradients = norm_gradients;
    task.measured = nullptr;
    if (problem.record != nullptr) {
      task.measured = record_of(slice.task, crew.index);
      fill_zero<double>(task.measured, record_numbers());
    }
    task.run();
  }

  // Once all tasks are done: what they have left, added up. Every member of the team calls it.
  void sum(const Member& member) const {
    const int64_t all = this->plan.groups * this->layout.units;
    const int64_t end = part_begin(all, member.count, member.index + 1);
    for (int64_t i = part_begin(all, member.count, member.index); i < end; ++i)
      sum_units(i / this->layout.units, i % this->layout.units * L);
    if (problem.record == nullptr) return;
    const int64_t end_step = part_begin(this->shape.steps, member.count, member.index + 1);
    for (int64_t t = part_begin(this->shape.steps, member.count, member.index); t < end_step; ++t)
      for (int64_t d = 0; d < this->shape.directions; ++d) sum_record(d, t, this->parts(member));
  }
  bool sums() const {
    return problem.dgamma != nullptr || problem.dparameters != nullptr || problem.record != nullptr;
  }

 private:
  void sum_units(int64_t group, int64_t unit) const {
    const int64_t size = this->shape.size;
    for (int gate = 0; problem.dgamma != nullptr && gate < facts().gates; ++gate) {
      const int64_t to = (group * facts().gates + gate) * size + unit;
      sum_rows(norm_gradients, norm_rows(), group, gate, unit,
               static_cast<A*>(problem.dgamma) + to);
      sum_rows(norm_gradients, norm_rows(), group, facts().gates + gate, unit,
               static_cast<A*>(problem.dbeta) + to);
    }
    for (int i = 0; problem.dparameters != nullptr && i < facts().parameters; ++i)
      sum_rows(
          dparameters, facts().parameters, group, i, unit,
          static_cast<A*>(problem.dparameters) + (i * this->plan.groups + group) * size + unit);
  }

  // Sums rows [B, groups, values] over the batch.
  void sum_rows(const A* rows, int64_t values, int64_t group, int64_t value, int64_t unit,
                A* to) const {
    V sum = {}, lost = {};
    for (int64_t b = 0; b < this->shape.batch; ++b) {
      const int64_t row = (b * this->plan.groups + group) * values + value;
      add_exactly(load(rows + row * stride + unit), sum, lost);
    }
    store(to, with_lost(sum, lost), this->shape.size - unit);
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

template <class S>
void backward(const CellPoints<S>& cell, const BackwardProblem& problem) {
  using A = Arithmetic<S>;
  using Run = BackwardRun<S>;
  const Shape& shape = problem.shape;
  const CellFacts& facts = cell.facts;
  if (shape.batch == 0 || shape.size == 0) {
    PointGradients<S>{problem, facts, 1}.clear();
    const int64_t points = shape.directions * shape.steps * (problem.per_sample ? shape.batch : 1);
    fill_zero<double>(problem.record, points * kFields);
    return;
  }
  const Plan plan = plan_call<A>(shape, facts.gates, problem.threads);
  const PackedLayout<A> layout = {facts.gates * shape.size, ceil_div(shape.size, kLanes<A>), 1,
                                  false, usual_sums<A>(facts.gates * shape.size)};
  const int64_t stride = row_stride<A>(shape.size);
  const int64_t du_stride = row_stride<A>(facts.gates * shape.size);
  const int64_t rows = ceil_div(shape.batch, plan.slices);
  const int64_t each = Run::of_task(facts, problem, rows, stride, du_stride);
  Run run = {{shape, plan, layout, each, nullptr, nullptr},
             problem,
             cell,
             stride,
             du_stride,
             {problem, facts, plan.threads}};
  const EmittedEdges<S> edges = {problem, cell};
  const std::size_t loop = static_cast<std::size_t>(run.all_elements()) * sizeof(A);
  const std::size_t after = static_cast<std::size_t>(run.gradients.elements()) * sizeof(A);
  const std::size_t most = loop > after ? loop : after;  // one use of it after the other
  const Scratch memory(most + edges.bytes());
  run.place(memory);
  run.gradients.place(memory);
  run.gradients.edges = edges.fill(memory.data() + most);
  const int64_t width = shape.directions * shape.heads * facts.gates * shape.size;
  expect_to_fill(problem.dp.data, bytes_of<S>(shape, width));
  if (problem.dx.data != problem.dp.data)
    expect_to_fill(problem.dx.data, bytes_of<S>(shape, problem.input_size));
  run_team(
      {plan.threads, plan.pool},
      [](void* context, const Member& member) {
        const FlushSubnormals flush;
        auto& run = *static_cast<Run*>(context);
        run.run(run, member);
        if (run.sums()) {
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
