// The arguments of a kernel: plain data. Sizes and strides count elements, a null pointer is an
// absent tensor. A group is one direction of one head: an independent recurrence.
//
// visit_fields(problem, visit) calls visit(name, field) for every field that Python gives, by the
// name that Python has for it (csrc/keywords.h).
#pragma once

#include <cstdint>

#include "cells/nonlinearity.h"
#include "record.h"

namespace rnnfast::cuda {

using cells::Nonlinearity;

// [T, B, groups * S], last axis dense.
template <class Pointer>
struct Sequence {
  Pointer data = nullptr;
  std::int64_t stride_t = 0;
  std::int64_t stride_b = 0;
};

struct Shape {
  int steps = 0;        // T
  int batch = 0;        // B
  int size = 0;         // S: units of a group
  int heads = 1;        // group = direction * heads + head
  int groups = 1;       // G
  bool paired = false;  // rows of 16-bit values begin at addresses that are multiples of 4 bytes
  // Set by the launch.
  int columns = 8;     // rows of the batch that a block, or a cluster, takes: 1 to 8
  float inv_size = 1;  // 1 / S
};

// w_hh [G * S, S], h_0 and h_n [D, B, heads * S] in the stored type; gamma and beta [G * S] and
// rstd [T, B, G] float32; contiguous.
struct Forward {
  Shape shape;
  Nonlinearity nonlinearity = Nonlinearity::kTanh;
  float norm_eps = 0;
  Sequence<const void*> p;
  const void* w_hh = nullptr;
  const float* gamma = nullptr;
  const float* beta = nullptr;
  const void* h_0 = nullptr;
  const std::int64_t* lengths = nullptr;  // [B], 0..T
  const std::uint8_t* reset = nullptr;    // [T, B]
  Sequence<void*> y;
  void* h_n = nullptr;
  Sequence<void*> ahat;
  float* rstd = nullptr;
  void* workspace = nullptr;  // as large as the plan says, at a multiple of 16 bytes
};

struct Backward {
  Shape shape;
  Nonlinearity nonlinearity = Nonlinearity::kTanh;
  int window = 0;  // no gradient crosses from t to t - 1 at its multiples; 0: no window
  float clip = 0;  // the largest norm that a row of dh may have; 0: any
  bool recompute_state = false;  // f' from ahat: a stored h has too few digits for it
  Sequence<const void*> grad_y;
  const void* grad_h_n = nullptr;
  Sequence<const void*> y;
  const void* w_hh = nullptr;
  const float* gamma = nullptr;
  const float* beta = nullptr;
  Sequence<const void*> ahat;
  const float* rstd = nullptr;
  const std::int64_t* lengths = nullptr;
  const std::uint8_t* reset = nullptr;
  Sequence<void*> dp;
  void* dh_0 = nullptr;
  float* dgamma = nullptr;  // [slices, G * S]: one part of the sum for each slice of the batch
  float* dbeta = nullptr;   // likewise
  float* carry = nullptr;   // [T, B, G * S]: c_t, where there is to be a record
  void* workspace = nullptr;
};

// The record of a backward pass, from its arguments and its results.
struct Measured {
  Shape shape;
  Nonlinearity nonlinearity = Nonlinearity::kTanh;
  int window = 0;
  float clip = 0;
  bool per_sample = false;
  const float* carry = nullptr;
  Sequence<const void*> grad_y;
  const void* grad_h_n = nullptr;
  Sequence<const void*> y;
  Sequence<const void*> dp;
  const std::int64_t* lengths = nullptr;
  const std::uint8_t* reset = nullptr;
  double* record = nullptr;  // [D, T, B or 1, kFields]
};

template <class Visit>
constexpr void visit_fields(Shape& shape, Visit&& visit) {
  visit("steps", shape.steps);
  visit("batch", shape.batch);
  visit("size", shape.size);
  visit("heads", shape.heads);
  visit("groups", shape.groups);
  visit("paired", shape.paired);
}

template <class Visit>
constexpr void visit_fields(Forward& problem, Visit&& visit) {
  visit_fields(problem.shape, visit);
  visit("cell", problem.nonlinearity);
  visit("norm_eps", problem.norm_eps);
  visit("p", problem.p);
  visit("w_hh", problem.w_hh);
  visit("gamma", problem.gamma);
  visit("beta", problem.beta);
  visit("h_0", problem.h_0);
  visit("lengths", problem.lengths);
  visit("reset", problem.reset);
  visit("y", problem.y);
  visit("h_n", problem.h_n);
  visit("ahat", problem.ahat);
  visit("rstd", problem.rstd);
  visit("workspace", problem.workspace);
}

template <class Visit>
constexpr void visit_fields(Backward& problem, Visit&& visit) {
  visit_fields(problem.shape, visit);
  visit("cell", problem.nonlinearity);
  visit("window", problem.window);
  visit("clip", problem.clip);
  visit("recompute_state", problem.recompute_state);
  visit("grad_y", problem.grad_y);
  visit("grad_h_n", problem.grad_h_n);
  visit("y", problem.y);
  visit("w_hh", problem.w_hh);
  visit("gamma", problem.gamma);
  visit("beta", problem.beta);
  visit("ahat", problem.ahat);
  visit("rstd", problem.rstd);
  visit("lengths", problem.lengths);
  visit("reset", problem.reset);
  visit("dp", problem.dp);
  visit("dh_0", problem.dh_0);
  visit("dgamma", problem.dgamma);
  visit("dbeta", problem.dbeta);
  visit("carry", problem.carry);
  visit("workspace", problem.workspace);
}

template <class Visit>
constexpr void visit_fields(Measured& problem, Visit&& visit) {
  visit_fields(problem.shape, visit);
  visit("cell", problem.nonlinearity);
  visit("window", problem.window);
  visit("clip", problem.clip);
  visit("per_sample", problem.per_sample);
  visit("carry", problem.carry);
  visit("grad_y", problem.grad_y);
  visit("grad_h_n", problem.grad_h_n);
  visit("y", problem.y);
  visit("dp", problem.dp);
  visit("lengths", problem.lengths);
  visit("reset", problem.reset);
  visit("record", problem.record);
}

}  // namespace rnnfast::cuda
