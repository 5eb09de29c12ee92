// The recurrences as a reader would write them: one row at a time, scalars, double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

using std::int64_t;
using Row = std::vector<double>;

enum class Kind { kTanh, kRelu, kSigmoid, kLstm, kGru, kLeaky };

inline int gates(Kind kind) { return kind == Kind::kLstm ? 4 : kind == Kind::kGru ? 3 : 1; }

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Values of one visited step, and BPTT's results for it.
struct Step {
  Row p, h_prev, c_prev, u, ahat, gate, h, c;
  double rstd;
  Row preact;  // p + u
  Row inner;   // what a cell takes for u where p is in it already
  Row saved;   // values that the kernel keeps, [values * S]
  // Gradients. carry: from the step after. dh, dc: with what comes from outside; dc at fixed h.
  Row grad_y, grad_c;  // from outside; no grad_c: 0
  Row carry, carry_c, dh, dc, clipped, clipped_c, dn, dp, du, dleak;
  Row total_c;  // of c, through h, too
};

struct Layer {
  Kind kind;
  int64_t size;
  const double* w;      // [gates * S, S]
  const double* b;      // [gates * S] or null
  const double* gamma;  // [gates * S] or null: no layer norm
  const double* beta;   // [gates * S] or null
  double norm_eps;
  double clip;
  bool recurrent = false;        // layer norm of u alone
  const double* leak = nullptr;  // [S]

  // The factor of W_hh, from a state.
  Row emit(const Row& v) const {
    Row h = v;
    for (double& x : h) x = sigmoid(x);
    return h;
  }

  // From a to gamma ahat + beta.
  void normalize(Step& s, Row& a) const {
    const double n = static_cast<double>(a.size());
    double mean = 0, variance = 0;
    for (double x : a) mean += x / n;
    for (double x : a) variance += (x - mean) * (x - mean) / n;
    s.rstd = 1 / std::sqrt(variance + norm_eps);
    s.ahat = a;
    for (size_t i = 0; i < a.size(); ++i) {
      s.ahat[i] = (a[i] - mean) * s.rstd;
      a[i] = gamma[i] * s.ahat[i] + (beta ? beta[i] : 0);
    }
  }

  // From dn, which is du, to the gradient of what was normalized.
  void normalize_backward(Step& s) const {
    const double n = static_cast<double>(s.du.size());
    double mean = 0, along = 0;
    s.dn = s.du;
    for (size_t i = 0; i < s.dn.size(); ++i) {
      mean += gamma[i] * s.dn[i] / n;
      along += gamma[i] * s.dn[i] * s.ahat[i] / n;
    }
    for (size_t i = 0; i < s.dn.size(); ++i)
      s.du[i] = s.rstd * (gamma[i] * s.dn[i] - mean - s.ahat[i] * along);
    if (!recurrent) s.dp = s.du;
  }

  // Whether c is a state beside h, whose gradient is clipped and recorded together with dh.
  bool beside() const { return kind == Kind::kLstm; }

  // Scales the joint vector (dh, dc) of a row.
  void clip_gradients(Step& s) const {
    double squares = 0;
    for (double x : s.dh) squares += x * x;
    if (beside())
      for (double x : s.dc) squares += x * x;
    const double norm = std::sqrt(squares);
    const double scale = std::isfinite(norm) && norm > clip ? clip / norm : 1;
    s.clipped = s.dh;
    s.clipped_c = s.dc;
    for (double& x : s.clipped) x *= scale;
    if (beside())
      for (double& x : s.clipped_c) x *= scale;
  }

  // The factor that passes straight through unit i.
  double gain(const Step& s, int64_t i) const {
    if (kind == Kind::kLstm || kind == Kind::kGru) return s.gate[size + i];
    return kind == Kind::kLeaky ? 1 - leak[i] : through(1, s.h[i]);
  }

  // dh f'(n) of an RNN.
  double through(double dh, double h) const {
    if (kind == Kind::kRelu) return h <= 0 ? 0 : dh;
    return dh * (kind == Kind::kTanh ? 1 - h * h : h * (1 - h));
  }

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
    if (gamma && recurrent) normalize(s, s.u);
    Row n_or_a = s.p;
    for (int64_t i = 0; i < count * n; ++i) n_or_a[i] += s.u[i];
    const bool joint = gamma && !recurrent;
    if (joint) normalize(s, n_or_a);
    s.inner = joint ? n_or_a : s.u;
    s.preact = n_or_a;
    s.gate.assign(s.u.size(), 0);
    s.h.assign(n, 0);
    s.c.assign(n, 0);
    for (int64_t i = 0; i < n; ++i) {
      const auto a = [&](int g) { return n_or_a[g * n + i]; };
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
          gate[2 * n] = std::tanh((joint ? 0 : s.p[2 * n + i]) + gate[0] * s.inner[2 * n + i]);
          s.h[i] = (1 - gate[n]) * gate[2 * n] + gate[n] * h[i];
          break;
        case Kind::kLeaky:
          gate[0] = a(0) - c[i];
          s.c[i] = c[i] + leak[i] * gate[0];
          s.h[i] = sigmoid(s.c[i]);
          break;
      }
    }
    save(s);
  }

  // The forget gate of an LSTM and z of a GRU are kept as they are before the sigmoid.
  void save(Step& s) const {
    const auto part = [&](const Row& from, int64_t value) {
      s.saved.insert(s.saved.end(), from.begin() + value * size, from.begin() + (value + 1) * size);
    };
    if (kind == Kind::kLeaky) part(s.gate, 0);
    if (kind != Kind::kLstm && kind != Kind::kGru) return;
    part(s.gate, 0);
    part(s.preact, 1);
    part(s.gate, 2);
    if (kind == Kind::kGru) return part(s.inner, 2);
    part(s.gate, 3);
    part(s.c_prev, 0);
  }

  // dh, dc: in, the gradient of what the step left; out, of what it found.
  void backward(Step& s, Row& dh, Row& dc) const {
    const int64_t n = size;
    const int count = gates(kind);
    s.dp.assign(s.u.size(), 0);
    s.du.assign(s.u.size(), 0);
    s.carry = dh;
    s.carry_c = dc;
    for (int64_t i = 0; i < n; ++i) dh[i] += s.grad_y[i];
    for (size_t i = 0; i < s.grad_c.size(); ++i) dc[i] += s.grad_c[i];
    s.dh = dh;
    s.dc = dc;
    clip_gradients(s);
    Row before(n, 0);
    s.dleak.assign(n, 0);
    s.total_c.assign(n, 0);
    for (int64_t i = 0; i < n; ++i) {
      const double g = s.clipped[i];
      double* const dp = &s.dp[i];
      double* const du = &s.du[i];
      const double* const gate = &s.gate[i];
      switch (kind) {
        case Kind::kTanh:
        case Kind::kRelu:
        case Kind::kSigmoid:
          dp[0] = through(g, s.h[i]);
          break;
        case Kind::kLstm: {
          const double tanh_c = std::tanh(s.c[i]);
          const double d = s.clipped_c[i] + g * gate[3 * n] * (1 - tanh_c * tanh_c);
          s.total_c[i] = d;
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
          dp[0] = dp[2 * n] * s.inner[2 * n + i] * r * (1 - r);
          dp[n] = g * (s.h_prev[i] - t) * z * (1 - z);
          du[2 * n] = dp[2 * n] * r;
          before[i] = g * z;
          break;
        }
        case Kind::kLeaky: {
          const double dv = dc[i] + g * s.h[i] * (1 - s.h[i]);
          dp[0] = leak[i] * dv;
          s.dleak[i] = dv * gate[0];
          dc[i] = (1 - leak[i]) * dv;
          break;
        }
      }
    }
    for (int64_t i = 0; i < (kind == Kind::kGru ? 2 : count) * n; ++i) s.du[i] = s.dp[i];
    if (gamma) normalize_backward(s);
    for (int64_t i = 0; i < count * n; ++i)
      for (int64_t k = 0; k < n; ++k) before[k] += s.du[i] * w[i * n + k];
    dh = before;
  }
};

}  // namespace reference
