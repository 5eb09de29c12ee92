// One layer, forward and backward, for callgrind to count:
// kernels CELL T B H [norm] [clip] [record].
// What is counted is what happens inside run_forward or run_backward (record.py asks for either by
// its name).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/problem.h"
#include "cpu/simd.h"
#include "record.h"

namespace cpu = rnnfast::cpu;
using Values = std::vector<float>;
using std::int64_t;

namespace rnnfast::cpu::RNNFAST_LEVEL {
extern const CellKernels kRnnTanh, kLstm, kGru;
}

struct Cell {
  const cpu::CellKernels* kernels;
  int64_t gates, saved;  // values per unit
  bool splits;           // du is not dp
  bool has_c;
};
Cell cell = {};

// C names, which callgrind takes as arguments; never inlined, or callgrind could not enter them.
extern "C" [[gnu::noinline]] void run_forward(const cpu::ForwardProblem& problem) {
  cell.kernels->forward(problem);
}
extern "C" [[gnu::noinline]] void run_backward(const cpu::BackwardProblem& problem) {
  cell.kernels->backward(problem);
}

namespace {

// The same on every machine, which the standard library's distributions are not.
Values numbers(int64_t count, float scale) {
  static unsigned state = 1;
  Values values(static_cast<std::size_t>(count));
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = scale * (static_cast<float>(state >> 8) * 0x1p-23f - 1);
  }
  return values;
}

Values poisoned(int64_t count) {
  return Values(static_cast<std::size_t>(count), std::numeric_limits<float>::quiet_NaN());
}

template <class Values>
bool all_finite(const Values& values) {
  for (auto value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

struct Wanted {
  bool norm = false, clip = false, record = false;
};

bool run(int64_t T, int64_t B, int64_t H, const Wanted& wanted) {
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  const Values x = numbers(T * B * H, 1), h_0 = numbers(B * H, 1);
  const int64_t W = cell.gates * H;
  const Values w_ih = numbers(W * H, scale), w_hh = numbers(W * H, scale);
  const Values b_ih = numbers(W, scale), b_hh = numbers(W, scale);
  const Values grad_y = numbers(T * B * H, 1), grad_h_n = numbers(B * H, 1);
  Values y = poisoned(T * B * H), h_n = poisoned(B * H), saved = poisoned(T * B * cell.saved * H);
  Values dp = poisoned(T * B * W), dx = poisoned(T * B * H), dh_0 = poisoned(B * H), du;
  Values dw_ih = poisoned(W * H), dw_hh = poisoned(W * H), db = poisoned(2 * W);
  Values c_0, c_n, dc_0, grad_c_n;
  if (cell.splits) du = poisoned(T * B * W);
  if (cell.has_c) {
    c_0 = numbers(B * H, 1);
    grad_c_n = numbers(B * H, 1);
    c_n = dc_0 = poisoned(B * H);
  }
  const Values gamma(static_cast<std::size_t>(H), 1), beta = numbers(H, scale);
  Values ahat, rstd, d_norm;
  if (wanted.norm) {
    ahat = poisoned(T * B * H);
    rstd = poisoned(T * B);
    d_norm = poisoned(2 * H);
  }
  std::vector<double> measured;
  if (wanted.record)
    measured.assign(static_cast<std::size_t>(T) * rnnfast::kFields,
                    std::numeric_limits<double>::quiet_NaN());

  cpu::ForwardProblem f;
  f.shape = {T, B, H, 1, 1};
  f.x = {x.data(), B * H, H};
  f.input_size = H;
  f.w_ih = w_ih.data();
  f.b_ih = b_ih.data();
  f.w_hh = w_hh.data();
  f.b_hh = b_hh.data();
  f.h_0 = h_0.data();
  f.y = {y.data(), B * H, H};
  if (cell.saved > 0) f.saved = {saved.data(), B * cell.saved * H, cell.saved * H};
  if (cell.has_c) {
    f.c_0 = c_0.data();
    f.c_n = c_n.data();
  }
  f.h_n = h_n.data();
  if (wanted.norm) {
    f.gamma = gamma.data();
    f.beta = beta.data();
    f.norm_eps = 1e-5;
    f.ahat = {ahat.data(), B * H, H};
    f.rstd = rstd.data();
  }
  run_forward(f);

  cpu::BackwardProblem g;
  g.shape = f.shape;
  g.grad_y = {grad_y.data(), B * H, H};
  g.grad_h_n = grad_h_n.data();
  g.y = {y.data(), B * H, H};
  g.x = f.x;
  g.input_size = H;
  g.w_ih = f.w_ih;
  g.w_hh = f.w_hh;
  g.h_0 = f.h_0;
  if (cell.saved > 0) g.saved = {saved.data(), B * cell.saved * H, cell.saved * H};
  if (cell.has_c) {
    g.grad_c_n = grad_c_n.data();
    g.dc_0 = dc_0.data();
  }
  g.dp = {dp.data(), B * W, W};
  if (cell.splits) g.du = {du.data(), B * W, W};
  g.dx = {dx.data(), B * H, H};
  g.dw_ih = dw_ih.data();
  g.db_ih = db.data();
  g.db_hh = db.data() + W;
  g.dw_hh = dw_hh.data();
  g.dh_0 = dh_0.data();
  if (wanted.norm) {
    g.gamma = f.gamma;
    g.beta = f.beta;
    g.ahat = {ahat.data(), B * H, H};
    g.rstd = rstd.data();
    g.dgamma = d_norm.data();
    g.dbeta = d_norm.data() + H;
  }
  if (wanted.clip) g.clip = 1;  // the norm of about every row is above it
  if (wanted.record) g.record = measured.data();
  run_backward(g);

  for (const Values* result : {&y, &h_n, &saved, &c_n, &dp, &du, &dx, &dh_0, &dc_0, &dw_ih, &dw_hh,
                               &db, &ahat, &rstd, &d_norm})
    if (!all_finite(*result)) return false;
  return all_finite(measured);
}

}  // namespace

int main(int count, char** arguments) {
  Wanted wanted;
  const struct {
    const char* name;
    Cell cell;
  } cells[] = {{"rnn_tanh", {&cpu::RNNFAST_LEVEL::kRnnTanh, 1, 0, false, false}},
               {"lstm", {&cpu::RNNFAST_LEVEL::kLstm, 4, 5, false, true}},
               {"gru", {&cpu::RNNFAST_LEVEL::kGru, 3, 4, true, false}}};
  for (const auto& known : cells)
    if (count > 1 && std::strcmp(arguments[1], known.name) == 0) cell = known.cell;
  bool known = count >= 5 && cell.kernels != nullptr;
  for (int i = 5; i < count; ++i) {
    bool* const option = std::strcmp(arguments[i], "norm") == 0     ? &wanted.norm
                         : std::strcmp(arguments[i], "clip") == 0   ? &wanted.clip
                         : std::strcmp(arguments[i], "record") == 0 ? &wanted.record
                                                                    : nullptr;
    known = known && option != nullptr;
    if (option != nullptr) *option = true;
  }
  if (!known) {
    std::fprintf(stderr, "usage: %s CELL T B H [norm] [clip] [record]\n", arguments[0]);
    return 2;
  }
  if (run(std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4]), wanted))
    return 0;
  std::fprintf(stderr, "a result was not written, or is not finite\n");
  return 1;
}
