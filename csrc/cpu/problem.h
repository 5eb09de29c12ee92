// The arguments of a kernel. Plain data without code, so that every SIMD level may include it.
// Sizes and strides count elements; a null pointer is an absent tensor.
#pragma once

#include <cstdint>

#include "record.h"

namespace rnnfast::cpu {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Shape {
  std::int64_t steps;       // T
  std::int64_t batch;       // B
  std::int64_t size;        // S: hidden size of one group
  std::int64_t directions;  // direction 1 runs in reverse real time
  std::int64_t heads;       // group = direction * heads + head
};

// One task = (group, slice of the batch), and it runs the whole time loop: alone, or where there
// are fewer tasks than threads with `parts` threads, each of which computes some of the hidden
// units and waits for the others after each step.
struct Plan {
  std::int64_t groups;
  std::int64_t slices;  // per group
  std::int64_t parts;   // per task
  int threads;
  int pool = 0;  // where the threads come from, see Threads

  std::int64_t tasks() const { return groups * slices; }
};

// [T, B, groups * values * S], last dimension contiguous; value v of group g at (g*values + v) * S.
template <class Pointer>
struct Sequence {
  Pointer data = nullptr;
  std::int64_t stride_t = 0;
  std::int64_t stride_b = 0;
};

// Contiguous: w_hh [D, heads*gates*S, S], w_ih [D, heads*gates*S, I], b_ih and b_hh
// [D, heads*gates*S], h_0 and h_n, c_0 and c_n [D, B, heads*S].
// The input is either p, or x [T, B, I] with w_ih and perhaps biases, p = x W_ih^T + b_ih + b_hh.
//
// h_0 and h_n are of the cell's first state, c_0 and c_n of its second one, if it has two.
// A cell's own parameters and their gradients: [kParameters, groups * S] in the arithmetic type.
//
// Layer norm, where gamma is given, over the gates * S values of one group: of p + u, or with
// norm_recurrent of u alone. gamma, beta, dgamma and dbeta [groups * gates * S] and rstd
// [T, B, groups] in the arithmetic type, contiguous; ahat [T, B, groups * gates * S].
struct ForwardProblem {
  const char* cell = "";  // its name: "rnn_tanh"
  Dtype dtype = Dtype::kFloat32;
  Shape shape = {};
  int threads = 1;
  const std::int64_t* lengths = nullptr;  // [B], 0..T
  const std::uint8_t* reset = nullptr;    // [T, B]: nothing crosses from t - 1 to t or back
  Sequence<const void*> p;
  Sequence<const void*> x;
  std::int64_t input_size = 0;  // I
  const void* w_ih = nullptr;
  const void* b_ih = nullptr;
  const void* w_hh = nullptr;
  const void* b_hh = nullptr;
  const void* h_0 = nullptr;
  const void* c_0 = nullptr;
  const void* gamma = nullptr;
  const void* beta = nullptr;
  double norm_eps = 0;
  bool norm_recurrent = false;
  const void* parameters = nullptr;
  Sequence<void*> y;
  Sequence<void*> saved;  // none: backward will not be called
  Sequence<void*> cells;  // the second state of every step, where it is wanted
  Sequence<void*> ahat;
  void* rstd = nullptr;
  void* h_n = nullptr;
  void* c_n = nullptr;
};

struct BackwardProblem {
  const char* cell = "";
  Dtype dtype = Dtype::kFloat32;
  Shape shape = {};
  int threads = 1;
  const std::int64_t* lengths = nullptr;
  const std::uint8_t* reset = nullptr;
  std::int64_t window = 0;  // no gradient crosses from t to t - 1 at its multiples; 0 for none
  double clip = __builtin_inf();  // most that the norm of a row of dh may be
  Sequence<const void*> grad_y;
  const void* grad_h_n = nullptr;
  const void* grad_c_n = nullptr;
  Sequence<const void*> grad_cells;
  Sequence<const void*> y;
  Sequence<const void*> saved;
  Sequence<const void*> x;  // and so on to w_ih: where forward had x
  std::int64_t input_size = 0;
  const void* w_ih = nullptr;
  const void* w_hh = nullptr;
  const void* h_0 = nullptr;
  const void* gamma = nullptr;
  const void* beta = nullptr;
  Sequence<const void*> ahat;
  const void* rstd = nullptr;
  bool norm_recurrent = false;
  const void* parameters = nullptr;
  Sequence<void*> dp;
  Sequence<void*> du;  // written where it differs from dp
  Sequence<void*> dx;  // may be the memory of dp
  void* dw_ih = nullptr;
  void* db_ih = nullptr;
  void* db_hh = nullptr;  // none without db_ih, nor with norm_recurrent: dbeta is what it would be
  void* dw_hh = nullptr;
  void* dgamma = nullptr;  // both or neither
  void* dbeta = nullptr;
  void* dparameters = nullptr;
  void* dh_0 = nullptr;
  void* dc_0 = nullptr;
  double* record = nullptr;  // [D, T, B or 1, kFields]
  bool per_sample = false;   // B of them
};

// The kernels of one cell at one SIMD level.
struct CellKernels {
  const char* name;
  void (*forward)(const ForwardProblem&);
  void (*backward)(const BackwardProblem&);
  Plan (*plan)(Dtype, const Shape&, int threads);
};

// Calls visit(name, field) for every field. The name is what Python calls it (csrc/keywords.h).
template <class Visit>
constexpr void visit_fields(Shape& shape, Visit&& visit) {
  visit("steps", shape.steps);
  visit("batch", shape.batch);
  visit("size", shape.size);
  visit("directions", shape.directions);
  visit("heads", shape.heads);
}

template <class Visit>
constexpr void visit_fields(ForwardProblem& problem, Visit&& visit) {
  visit("cell", problem.cell);
  visit("dtype", problem.dtype);
  visit_fields(problem.shape, visit);
  visit("threads", problem.threads);
  visit("lengths", problem.lengths);
  visit("reset", problem.reset);
  visit("p", problem.p);
  visit("x", problem.x);
  visit("input_size", problem.input_size);
  visit("w_ih", problem.w_ih);
  visit("b_ih", problem.b_ih);
  visit("w_hh", problem.w_hh);
  visit("b_hh", problem.b_hh);
  visit("h_0", problem.h_0);
  visit("c_0", problem.c_0);
  visit("gamma", problem.gamma);
  visit("beta", problem.beta);
  visit("norm_eps", problem.norm_eps);
  visit("norm_recurrent", problem.norm_recurrent);
  visit("parameters", problem.parameters);
  visit("y", problem.y);
  visit("saved", problem.saved);
  visit("cells", problem.cells);
  visit("ahat", problem.ahat);
  visit("rstd", problem.rstd);
  visit("h_n", problem.h_n);
  visit("c_n", problem.c_n);
}

template <class Visit>
constexpr void visit_fields(BackwardProblem& problem, Visit&& visit) {
  visit("cell", problem.cell);
  visit("dtype", problem.dtype);
  visit_fields(problem.shape, visit);
  visit("threads", problem.threads);
  visit("lengths", problem.lengths);
  visit("reset", problem.reset);
  visit("window", problem.window);
  visit("clip", problem.clip);
  visit("grad_y", problem.grad_y);
  visit("grad_h_n", problem.grad_h_n);
  visit("grad_c_n", problem.grad_c_n);
  visit("grad_cells", problem.grad_cells);
  visit("y", problem.y);
  visit("saved", problem.saved);
  visit("x", problem.x);
  visit("input_size", problem.input_size);
  visit("w_ih", problem.w_ih);
  visit("w_hh", problem.w_hh);
  visit("h_0", problem.h_0);
  visit("gamma", problem.gamma);
  visit("beta", problem.beta);
  visit("ahat", problem.ahat);
  visit("rstd", problem.rstd);
  visit("norm_recurrent", problem.norm_recurrent);
  visit("parameters", problem.parameters);
  visit("dp", problem.dp);
  visit("du", problem.du);
  visit("dx", problem.dx);
  visit("dw_ih", problem.dw_ih);
  visit("db_ih", problem.db_ih);
  visit("db_hh", problem.db_hh);
  visit("dw_hh", problem.dw_hh);
  visit("dgamma", problem.dgamma);
  visit("dbeta", problem.dbeta);
  visit("dparameters", problem.dparameters);
  visit("dh_0", problem.dh_0);
  visit("dc_0", problem.dc_0);
  visit("record", problem.record);
  visit("per_sample", problem.per_sample);
}

}  // namespace rnnfast::cpu
