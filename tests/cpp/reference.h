// The recurrences as a reader would write them: one row at a time, scalars, double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

using std::int64_t;
using Row = std::vector<double>;

enum class Kind { kTanh, kRelu, kSigmoid, kLstm, kGru };

inline int gates(Kind kind) { return kind == Kind::kLstm ? 4 : kind == Kind::kGru ? 3 : 1; }

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// What one visited step knows and what BPTT finds out about it.
struct Step {
  Row p, h_prev, c_prev, u, gate, h, c;
  Row grad_y, dp, du;
};

struct Layer {
  Kind kind;
  int64_t size;
  const double* w;  // [gates * S, S]
  const double* b;  // [gates * S] or null

  void forward(Step& s, const Row& h, const Row& c) const {
    const int64_t n = size;
    const int count = gates(kind);
    s.h_prev = h;
    s.c_prev = c;
    s.u.assign(static_cast<size_t>(count * n), 0);
    for (int64_t i = 0; i < count * n; ++i) {
      s.u[i] = b ? b[i] : 0;
      for (int64_t k = 0; k < n; ++k) s.u[i] += w[i * n + k] * h[k];
    }
    s.gate.assign(s.u.size(), 0);
    s.h.assign(n, 0);
    s.c.assign(n, 0);
    for (int64_t i = 0; i < n; ++i) {
      const auto a = [&](int g) { return s.p[g * n + i] + s.u[g * n + i]; };
      double* const gate = &s.gate[i];
      switch (kind) {
        case Kind::kTanh:
          s.h[i] = std::tanh(a(0));
          break;
        case Kind::kRelu:
          s.h[i] = a(0) < 0 ? 0 : a(0);
          break;
        case Kind::kSigmoid:
          s.h[i] = sigmoid(a(0));
          break;
        case Kind::kLstm:
          for (int g = 0; g < 4; ++g) gate[g * n] = g == 2 ? std::tanh(a(g)) : sigmoid(a(g));
          s.c[i] = gate[n] * c[i] + gate[0] * gate[2 * n];
          s.h[i] = gate[3 * n] * std::tanh(s.c[i]);
          break;
        case Kind::kGru:
          gate[0] = sigmoid(a(0));
          gate[n] = sigmoid(a(1));
          gate[2 * n] = std::tanh(s.p[2 * n + i] + gate[0] * s.u[2 * n + i]);
          s.h[i] = (1 - gate[n]) * gate[2 * n] + gate[n] * h[i];
          break;
      }
    }
  }

  // dh, dc: in, the gradient of what the step left; out, of what it found.
  void backward(Step& s, Row& dh, Row& dc) const {
    const int64_t n = size;
    const int count = gates(kind);
    s.dp.assign(s.u.size(), 0);
    s.du.assign(s.u.size(), 0);
    Row before(n, 0);
    for (int64_t i = 0; i < n; ++i) {
      const double g = dh[i] + s.grad_y[i];
      double* const dp = &s.dp[i];
      double* const du = &s.du[i];
      const double* const gate = &s.gate[i];
      switch (kind) {
        case Kind::kTanh:
          dp[0] = g * (1 - s.h[i] * s.h[i]);
          break;
        case Kind::kRelu:
          dp[0] = s.h[i] > 0 ? g : 0;
          break;
        case Kind::kSigmoid:
          dp[0] = g * s.h[i] * (1 - s.h[i]);
          break;
        case Kind::kLstm: {
          const double tanh_c = std::tanh(s.c[i]);
          const double d = dc[i] + g * gate[3 * n] * (1 - tanh_c * tanh_c);
          dp[0] = d * gate[2 * n] * gate[0] * (1 - gate[0]);
          dp[n] = d * s.c_prev[i] * gate[n] * (1 - gate[n]);
          dp[2 * n] = d * gate[0] * (1 - gate[2 * n] * gate[2 * n]);
          dp[3 * n] = g * tanh_c * gate[3 * n] * (1 - gate[3 * n]);
          dc[i] = d * gate[n];
          break;
        }
        case Kind::kGru: {
          const double r = gate[0], z = gate[n], t = gate[2 * n];
          dp[2 * n] = g * (1 - z) * (1 - t * t);
          dp[0] = dp[2 * n] * s.u[2 * n + i] * r * (1 - r);
          dp[n] = g * (s.h_prev[i] - t) * z * (1 - z);
          du[2 * n] = dp[2 * n] * r;
          before[i] = g * z;
          break;
        }
      }
      for (int gate_index = 0; gate_index < count; ++gate_index) {
        if (kind != Kind::kGru || gate_index < 2) du[gate_index * n] = dp[gate_index * n];
      }
    }
    for (int64_t i = 0; i < count * n; ++i)
      for (int64_t k = 0; k < n; ++k) before[k] += s.du[i] * w[i * n + k];
    dh = before;
  }
};

}  // namespace reference
