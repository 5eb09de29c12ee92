// What a kernel is told: plain data. Sizes and strides count elements, a null pointer is an absent
// tensor. One group is one direction of one head: an independent recurrence.
#pragma once

#include <cstdint>

#include "cells/rnn.h"
#include "record.h"

namespace rnnfast::cuda {

using cells::Nonlinearity;

// Of [T, B, groups * S], last axis dense.
struct Strides {
  std::int64_t t = 0;
  std::int64_t b = 0;
};

struct Shape {
  int steps = 0;        // T
  int batch = 0;        // B
  int size = 0;         // S: units of a group
  int heads = 1;        // group = direction * heads + head
  int groups = 1;       // G
  int columns = 8;      // rows of the batch that a block, or a cluster, takes: 1 to 8
  float each = 1;       // 1 / S
  bool paired = false;  // rows of 16-bit values begin at addresses that are multiples of 4 bytes
};

// w_hh [G * S, S], h_0 and h_n [D, B, heads * S] in the stored type; gamma and beta [G * S] and
// rstd [T, B, G] float32; contiguous. ahat has the strides of y.
struct Forward {
  Shape shape;
  Nonlinearity nonlinearity = Nonlinearity::kTanh;
  float norm_eps = 0;
  const void* p = nullptr;
  const void* w_hh = nullptr;
  const float* gamma = nullptr;
  const float* beta = nullptr;
  const void* h_0 = nullptr;
  const std::int64_t* lengths = nullptr;  // [B], 0..T
  const std::uint8_t* reset = nullptr;    // [T, B]
  void* y = nullptr;
  void* h_n = nullptr;
  void* ahat = nullptr;
  float* rstd = nullptr;
  void* workspace = nullptr;  // of the plan, at a multiple of 16 bytes
  Strides p_strides, y_strides;
};

struct Backward {
  Shape shape;
  Nonlinearity nonlinearity = Nonlinearity::kTanh;
  int window = 0;     // no gradient crosses from t to t - 1 at its multiples; 0 for none
  float limit = 0;    // most that the norm of a row of dh may be; 0 for any
  bool anew = false;  // f' from ahat: of a stored h too few digits are left
  const void* grad_y = nullptr;
  const void* grad_h_n = nullptr;
  const void* y = nullptr;
  const void* w_hh = nullptr;
  const float* gamma = nullptr;
  const float* beta = nullptr;
  const void* ahat = nullptr;
  const float* rstd = nullptr;
  const std::int64_t* lengths = nullptr;
  const std::uint8_t* reset = nullptr;
  void* dp = nullptr;
  void* dh_0 = nullptr;
  float* dgamma = nullptr;  // [slices, G * S]: one part of the sum for each slice of the batch
  float* dbeta = nullptr;   // likewise
  float* carry = nullptr;   // [T, B, G * S]: c_t, where there is to be a record
  void* workspace = nullptr;
  Strides grad_y_strides, y_strides, ahat_strides, dp_strides;
};

// The record of a backward pass, from what it was given and has left.
struct Measured {
  Shape shape;
  Nonlinearity nonlinearity = Nonlinearity::kTanh;
  int window = 0;
  float limit = 0;
  bool per_sample = false;
  const float* carry = nullptr;
  const void* grad_y = nullptr;
  const void* grad_h_n = nullptr;
  const void* y = nullptr;
  const void* dp = nullptr;
  const std::int64_t* lengths = nullptr;
  const std::uint8_t* reset = nullptr;
  double* record = nullptr;  // [D, T, B or 1, kFields]
  Strides grad_y_strides, y_strides, dp_strides;
};

}  // namespace rnnfast::cuda
