// One layer, forward and backward, for callgrind to count: kernels T B H [norm] [clip] [record].
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
extern const CellKernels kRnnTanh;
}
const cpu::CellKernels& cell = cpu::RNNFAST_LEVEL::kRnnTanh;

// C names, which callgrind takes as arguments; never inlined, or callgrind could not enter them.
extern "C" [[gnu::noinline]] void run_forward(const cpu::ForwardProblem& problem) {
  cell.forward(problem);
}
extern "C" [[gnu::noinline]] void run_backward(const cpu::BackwardProblem& problem) {
  cell.backward(problem);
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
  const Values w_ih = numbers(H * H, scale), w_hh = numbers(H * H, scale);
  const Values b_ih = numbers(H, scale), b_hh = numbers(H, scale);
  const Values grad_y = numbers(T * B * H, 1), grad_h_n = numbers(B * H, 1);
  Values y = poisoned(T * B * H), h_n = poisoned(B * H);
  Values dp = poisoned(T * B * H), dx = poisoned(T * B * H), dh_0 = poisoned(B * H);
  Values dw_ih = poisoned(H * H), dw_hh = poisoned(H * H), db = poisoned(2 * H);
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
  g.dp = {dp.data(), B * H, H};
  g.dx = {dx.data(), B * H, H};
  g.dw_ih = dw_ih.data();
  g.db_ih = db.data();
  g.db_hh = db.data() + H;
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

  for (const Values* result :
       {&y, &h_n, &dp, &dx, &dh_0, &dw_ih, &dw_hh, &db, &ahat, &rstd, &d_norm})
    if (!all_finite(*result)) return false;
  return all_finite(measured);
}

}  // namespace

int main(int count, char** arguments) {
  Wanted wanted;
  bool known = count >= 4;
  for (int i = 4; i < count; ++i) {
    bool* const option = std::strcmp(arguments[i], "norm") == 0     ? &wanted.norm
                         : std::strcmp(arguments[i], "clip") == 0   ? &wanted.clip
                         : std::strcmp(arguments[i], "record") == 0 ? &wanted.record
                                                                    : nullptr;
    known = known && option != nullptr;
    if (option != nullptr) *option = true;
  }
  if (!known) {
    std::fprintf(stderr, "usage: %s T B H [norm] [clip] [record]\n", arguments[0]);
    return 2;
  }
  if (run(std::atoll(arguments[1]), std::atoll(arguments[2]), std::atoll(arguments[3]), wanted))
    return 0;
  std::fprintf(stderr, "a result was not written, or is not finite\n");
  return 1;
}
