// What a kernel is asked to do. Plain data without code, so that every SIMD level may include it.
// Sizes and strides count elements; a null pointer is an absent tensor.
#pragma once

#include <cstdint>

#include "cells/rnn.h"
#include "record.h"

namespace rnnfast::cpu {

using cells::Nonlinearity;
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
// [D, heads*gates*S], h0 and h_n [D, B, heads*S], carried0 and carried_n [kCarried, D, B, heads*S].
// The input is either p, or x [T, B, I] with w_ih and perhaps biases, p = x W_ih^T + b_ih + b_hh.
//
// Layer norm, where gamma is given: gamma, beta, dgamma and dbeta [groups * S] and rstd
// [T, B, groups] in the arithmetic type, contiguous.
struct ForwardProblem {
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
  const void* h0 = nullptr;
  const void* carried0 = nullptr;
  const void* gamma = nullptr;
  const void* beta = nullptr;
  double norm_eps = 0;
  Sequence<void*> y;
  Sequence<void*> saved;
  Sequence<void*> ahat;
  void* rstd = nullptr;
  void* h_n = nullptr;
  void* carried_n = nullptr;
};

struct BackwardProblem {
  Shape shape = {};
  int threads = 1;
  const std::int64_t* lengths = nullptr;
  const std::uint8_t* reset = nullptr;
  std::int64_t window = 0;  // no gradient crosses from t to t - 1 at its multiples; 0 for none
  double clip = __builtin_inf();  // most that the norm of a row of dh may be
  Sequence<const void*> grad_y;
  const void* grad_h_n = nullptr;
  const void* grad_carried_n = nullptr;
  Sequence<const void*> y;
  Sequence<const void*> saved;
  Sequence<const void*> x;  // and so on to w_ih: where forward had x
  std::int64_t input_size = 0;
  const void* w_ih = nullptr;
  const void* w_hh = nullptr;
  const void* h0 = nullptr;
  const void* gamma = nullptr;
  const void* beta = nullptr;
  Sequence<const void*> ahat;
  const void* rstd = nullptr;
  Sequence<void*> dp;
  Sequence<void*> du;  // written only by cells with kSplitGradient
  Sequence<void*> dx;  // may be the memory of dp
  void* dw_ih = nullptr;
  void* db_ih = nullptr;  // both or neither
  void* db_hh = nullptr;
  void* dw_hh = nullptr;
  void* dgamma = nullptr;  // both or neither
  void* dbeta = nullptr;
  void* dh0 = nullptr;
  void* dcarried0 = nullptr;
  double* record = nullptr;  // [D, T, B or 1, kFields]
  bool per_sample = false;   // B of them
};

}  // namespace rnnfast::cpu
