// Whole layers: the projection inside the kernel, and what backward returns beside da, against
// naive sums over the da that it put out (kernel_test.cpp has judged that one). Every mix of what
// is wanted, one to five threads, outputs that start as NaN.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

// So that small problems, too, are shared by threads in every way that there is.
#define RNNFAST_WORTH_THREADS 0
#define RNNFAST_WORTH_WAITING 0
#define RNNFAST_WORTH_STARTING 0
#include "../../csrc/cells/gru.h"
#include "../../csrc/cells/lstm.h"
#include "../../csrc/cells/rnn.h"
#include "../../csrc/cpu/launch.h"
#include "../../csrc/cpu/math.h"
#include "buffer.h"
#include "reference.h"

namespace cpu = rnnfast::cpu;
namespace level = rnnfast::cpu::RNNFAST_LEVEL;
namespace cells = rnnfast::cells;
using reference::Kind;

template <>
constexpr bool kHalf<level::Float16> = true;

namespace {

int failures = 0;

struct Sizes {
  int64_t T, B, H, I, D;
  bool bias, lengths, batch_major;
  int wanted;         // 1 dx, 2 gradients of weights, 4 dh_0
  bool norm = false;  // layer norm
};

template <class Cell, class S>
struct Layer {
  Kind kind;
  Sizes n;
  int64_t W = n.D * Cell::kGates * n.H, Y = n.D * n.H, states = n.D * n.B * n.H;
  int64_t points = n.T * n.B;
  using Data = Buffer<S>;
  Data x = Data::random(points * n.I, 0.5), w_ih = Data::random(W * n.I, 0.5),
       w_hh = Data::random(W * n.H, 0.5);
  Data b_ih = Data::random(W, 0.5), b_hh = Data::random(W, 0.5), h_0 = Data::random(states, 0.5);
  Data c_0 = Data::random(states, 0.5), grad_y = Data::random(points * Y, 0.5);
  Data grad_h_n = Data::random(states, 0.5), grad_c_n = Data::random(states, 0.5);
  Buffer<int64_t> lengths{n.B};
  static constexpr double kEps = 1e-3;
  Data gamma = Data::random(Y, 0.5), beta = Data::random(Y, 0.5);

  struct Results {
    Data y, h_n, c_n, saved, dp, du, dx, dw_ih, db_ih, db_hh, dw_hh, dh_0, dc_0;
    Data ahat, rstd, dgamma, dbeta;
  };

  int64_t stride_t(int64_t width) const { return n.batch_major ? width : n.B * width; }
  int64_t stride_b(int64_t width) const { return n.batch_major ? n.T * width : width; }
  int64_t place(int64_t t, int64_t b, int64_t width) const {
    return t * stride_t(width) + b * stride_b(width);
  }
  template <class Pointer>
  cpu::Sequence<Pointer> sequence(Data& data, int64_t width) {
    return {data.get(), stride_t(width), stride_b(width)};
  }

  Results run(int threads) {
    const int64_t kept = Cell::kSaved * Y;
    Results r = {Data(points * Y), Data(states),     Data(states),       Data(points * kept),
                 Data(points * W), Data(points * W), Data(points * n.I), Data(W * n.I),
                 Data(W),          Data(W),          Data(W * n.H),      Data(states),
                 Data(states),     Data(points * Y), Data(points * n.D), Data(Y),
                 Data(Y)};
    cpu::ForwardProblem f;
    f.shape = {n.T, n.B, n.H, n.D, 1};
    f.threads = threads;
    f.lengths = n.lengths ? lengths.get() : nullptr;
    f.x = sequence<const void*>(x, n.I);
    f.input_size = n.I;
    f.w_ih = w_ih.get();
    f.b_ih = n.bias ? b_ih.get() : nullptr;
    f.b_hh = n.bias ? b_hh.get() : nullptr;
    f.w_hh = w_hh.get();
    f.h_0 = h_0.get();
    f.c_0 = c_0.get();
    f.y = sequence<void*>(r.y, Y);
    f.saved = sequence<void*>(r.saved, kept);
    f.h_n = r.h_n.get();
    f.c_n = r.c_n.get();
    if (n.norm) {
      f.gamma = gamma.get();
      f.beta = beta.get();
      f.norm_eps = kEps;
      f.ahat = sequence<void*>(r.ahat, Y);
      f.rstd = r.rstd.get();
    }
    level::forward(level::kPoints<Cell, S>, f);
    cpu::BackwardProblem g;
    g.shape = f.shape;
    g.threads = threads;
    g.lengths = f.lengths;
    g.grad_y = sequence<const void*>(grad_y, Y);
    g.grad_h_n = grad_h_n.get();
    g.grad_c_n = grad_c_n.get();
    g.y = sequence<const void*>(r.y, Y);
    g.saved = sequence<const void*>(r.saved, kept);
    g.x = f.x;
    g.input_size = n.I;
    g.w_ih = w_ih.get();
    g.w_hh = w_hh.get();
    g.h_0 = h_0.get();
    g.dp = sequence<void*>(r.dp, W);
    g.du = sequence<void*>(r.du, W);
    if (n.wanted & 1) g.dx = sequence<void*>(r.dx, n.I);
    if (n.wanted & 2) {
      g.dw_ih = r.dw_ih.get();
      g.db_ih = r.db_ih.get();
      g.db_hh = r.db_hh.get();
      g.dw_hh = r.dw_hh.get();
    }
    g.dh_0 = n.wanted & 4 ? r.dh_0.get() : nullptr;
    g.dc_0 = Cell::kCarried > 0 ? r.dc_0.get() : nullptr;
    if (n.norm) {
      g.gamma = gamma.get();
      g.beta = f.beta;
      g.ahat = sequence<const void*>(r.ahat, Y);
      g.rstd = r.rstd.get();
      g.dgamma = r.dgamma.get();
      g.dbeta = r.dbeta.get();
    }
    level::backward(level::kPoints<Cell, S>, g);
    return r;
  }

  std::vector<const Data*> outputs(const Results& r) const {
    std::vector<const Data*> all = {&r.y, &r.h_n, &r.c_n, &r.saved, &r.dp, &r.dc_0};
    if (Cell::kSplitGradient) all.push_back(&r.du);
    if (n.wanted & 1) all.push_back(&r.dx);
    if (n.wanted & 2)
      for (const Data* data : {&r.dw_ih, &r.db_ih, &r.db_hh, &r.dw_hh}) all.push_back(data);
    if (n.wanted & 4) all.push_back(&r.dh_0);
    if (n.norm)
      for (const Data* data : {&r.ahat, &r.rstd, &r.dgamma, &r.dbeta}) all.push_back(data);
    return all;
  }

  void fail(const char* what, double found, double wanted) const {
    if (++failures < 20)
      std::printf("%s %g, expected %g: T %ld B %ld H %ld I %ld D %ld gates %d\n", what, found,
                  wanted, n.T, n.B, n.H, n.I, n.D, Cell::kGates);
  }

  void expect(const char* what, double found, double wanted) const {
    const double tolerance = sizeof(S) == 2 ? 6e-2 : sizeof(S) == 4 ? 1e-4 : 1e-11;
    if (!(std::fabs(found - wanted) <= tolerance * (1 + std::fabs(wanted))))  // a NaN fails, too
      fail(what, found, wanted);
  }

  void check_products(const Results& r) const {
    const Data& du = Cell::kSplitGradient ? r.du : r.dp;
    const auto sum = [&](auto&& term) {
      double total = 0;
      for (int64_t t = 0; t < n.T; ++t)
        for (int64_t b = 0; b < n.B; ++b) total += term(t, b);
      return total;
    };
    for (int64_t t = 0; t < n.T && n.wanted & 1; ++t)
      for (int64_t b = 0; b < n.B; ++b)
        for (int64_t i = 0; i < n.I; ++i) {
          double total = 0;
          for (int64_t j = 0; j < W; ++j)
            total += r.dp.at(place(t, b, W) + j) * w_ih.at(j * n.I + i);
          expect("dx", r.dx.at(place(t, b, n.I) + i), total);
        }
    for (int64_t j = 0; j < W && n.wanted & 2; ++j) {
      const auto of = [&](const Data& data) {
        return sum([&](int64_t t, int64_t b) { return data.at(place(t, b, W) + j); });
      };
      expect("db_ih", r.db_ih.at(j), of(r.dp));
      expect("db_hh", r.db_hh.at(j), of(du));
      for (int64_t i = 0; i < n.I; ++i)
        expect("dw_ih", r.dw_ih.at(j * n.I + i), sum([&](int64_t t, int64_t b) {
                 return r.dp.at(place(t, b, W) + j) * x.at(place(t, b, n.I) + i);
               }));
    }
  }

  static reference::Row row_of(const Data& data, int64_t first, int64_t count) {
    reference::Row row(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) row[static_cast<size_t>(i)] = data.at(first + i);
    return row;
  }

  // h and the saved values of the first step of each row, forward direction.
  void check_first_step(const Results& r) const {
    const int64_t gates = Cell::kGates * n.H;
    const reference::Row w = row_of(w_hh, 0, gates * n.H), b = row_of(b_hh, 0, gates);
    const reference::Row scale = row_of(gamma, 0, n.H), shift = row_of(beta, 0, n.H);
    const bool inner_bias = n.bias && Cell::kRecurrentBias;
    const reference::Layer layer{kind,
                                 n.H,
                                 w.data(),
                                 inner_bias ? b.data() : nullptr,
                                 n.norm ? scale.data() : nullptr,
                                 n.norm ? shift.data() : nullptr,
                                 kEps,
                                 HUGE_VAL};
    for (int64_t row = 0; row < n.B; ++row) {
      if (n.lengths && lengths.data[row] == 0) continue;
      reference::Step step;
      step.p.assign(static_cast<size_t>(gates), 0);
      for (int64_t j = 0; j < gates; ++j) {
        double& p = step.p[static_cast<size_t>(j)];
        if (n.bias) p += b_ih.at(j) + (inner_bias ? 0 : b_hh.at(j));
        for (int64_t i = 0; i < n.I; ++i) p += x.at(place(0, row, n.I) + i) * w_ih.at(j * n.I + i);
      }
      layer.forward(step, row_of(h_0, row * n.H, n.H), row_of(c_0, row * n.H, n.H));
      for (int64_t j = 0; j < n.H; ++j)
        expect("y", r.y.at(place(0, row, Y) + j), step.h[static_cast<size_t>(j)]);
      const int64_t kept = Cell::kSaved * n.H;
      for (int64_t j = 0; j < kept; ++j)
        expect("saved", r.saved.at(place(0, row, Cell::kSaved * Y) + j),
               step.saved[static_cast<size_t>(j)]);
    }
  }

  void check() {
    for (int64_t b = 0; b < n.B; ++b)
      lengths.data[b] = b == 0 && n.B > 1 ? 0 : b == 1 ? n.T : b * 5 % (n.T + 1);
    const Results first = run(1);
    check_products(first);
    check_first_step(first);
    for (int threads = 2; threads <= 5; ++threads) {
      const Results again = run(threads);
      const auto wanted = outputs(first), found = outputs(again);
      for (size_t i = 0; i < wanted.size(); ++i)
        if (std::memcmp(wanted[i]->data.get(), found[i]->data.get(),
                        static_cast<size_t>(wanted[i]->size) * sizeof(S)) != 0)
          fail("other bits with more threads, output", static_cast<double>(i), threads);
    }
  }
};

template <class S>
void check_type() {
  using Math = level::Math<level::Arithmetic<S>>;
  using Tanh = cells::Rnn<cells::Tanh, Math>;
  using Lstm = cells::Lstm<Math>;
  using Gru = cells::Gru<Math>;
  int variant = 0;
  for (int64_t H : {1, 3, 17, 33})
    for (int64_t I : {1, 5, 16, 40})
      for (int64_t B : {1, 2, 7, 130})
        for (int64_t T : {1, 2, 9}) {
          ++variant;
          if (T * B * H * I > 20000) continue;
          const Sizes n = {T,
                           B,
                           H,
                           I,
                           1 + variant % 2,
                           variant % 3 > 0,
                           variant % 4 >= 2,
                           variant % 5 == 0,
                           1 + variant % 7};
          Layer<Tanh, S>{Kind::kTanh, n}.check();
          if constexpr (sizeof(S) == 4) {
            Sizes with_norm = n;
            with_norm.norm = true;
            Layer<Tanh, S>{Kind::kTanh, with_norm}.check();
          }
          if (variant % 3 > 0) continue;
          Layer<Lstm, S>{Kind::kLstm, n}.check();
          Sizes with_bias = n;
          with_bias.bias = true;
          Layer<Gru, S>{Kind::kGru, with_bias}.check();
        }
  Layer<Tanh, S>{Kind::kTanh, {70, 9, 13, 5, 2, true, true, false, 7}}.check();
  Layer<Tanh, S>{Kind::kTanh, {3, 300, 5, 3, 1, true, true, true, 7}}.check();
  // Points enough for two sums of them.
  Layer<Tanh, S>{Kind::kTanh, {23, 91, 13, 5, 2, true, true, false, 7}}.check();
  Layer<Lstm, S>{Kind::kLstm, {23, 91, 5, 5, 1, true, true, false, 7}}.check();
  Layer<Gru, S>{Kind::kGru, {30, 70, 5, 5, 1, true, true, true, 7}}.check();
}

}  // namespace

int main() {
  cpu::set_cores(5);  // wherever it runs
  check_type<float>();
  check_type<double>();
  check_type<level::BFloat16>();
  check_type<level::Float16>();
  std::printf(failures ? "%d failures\n" : "all layers agree with naive sums\n", failures);
  return failures != 0;
}
