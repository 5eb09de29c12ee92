// The time loops against a naive double loop, without Python, for the sanitizers. From tests/cpp:
//
//   S="kernel_test.cpp ../../csrc/cpu/parallel.cpp -std=c++20 -O1 -g -pthread -ffp-contract=fast"
//   g++ $S -fsanitize=address,undefined -fno-sanitize-recover=all -o /tmp/t && /tmp/t
//   g++ $S -fsanitize=thread -o /tmp/t && /tmp/t
//
// and the same with -DRNNFAST_SIMD_AVX2 -mavx2 -mfma -mf16c, or
// -DRNNFAST_SIMD_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

// So that small problems, too, are shared by threads in every way that there is.
#define RNNFAST_WORTH_THREADS 0
#define RNNFAST_WORTH_WAITING 0
#include "../../csrc/cpu/launch.h"
#include "../../csrc/cpu/math.h"
#include "gru.h"
#include "lstm.h"
#include "reference.h"

namespace cpu = rnnfast::cpu;
namespace level = rnnfast::cpu::RNNFAST_LEVEL;
namespace cells = rnnfast::cells;
using reference::Kind;
using std::int64_t;

namespace {

int failures = 0;

// Exactly as long as asked, from malloc, so that the address sanitizer sees one element too far.
template <class S>
struct Buffer {
  std::unique_ptr<S[]> data;
  int64_t size;
  explicit Buffer(int64_t n) : data(new S[static_cast<size_t>(n)]), size(n) {}
  S* get() { return data.get(); }
};

template <class S>
Buffer<S> random_buffer(std::mt19937_64& engine, int64_t n, double scale) {
  std::uniform_real_distribution<double> uniform(-scale, scale);
  Buffer<S> buffer(n);
  for (int64_t i = 0; i < n; ++i) buffer.data[i] = static_cast<S>(uniform(engine));
  return buffer;
}

template <class S>
Buffer<S> poisoned(int64_t n) {
  Buffer<S> buffer(n);
  for (int64_t i = 0; i < n; ++i) buffer.data[i] = std::numeric_limits<S>::quiet_NaN();
  return buffer;
}

template <class S>
struct Test {
  Kind kind;
  cpu::Shape shape;
  bool with_lengths;
  bool batch_major;
  std::mt19937_64 engine{42};

  int gates = reference::gates(kind);
  int64_t groups = shape.directions * shape.heads;
  int64_t units = groups * shape.size;
  int64_t points = shape.steps * shape.batch;
  int64_t states = shape.directions * shape.batch * shape.heads * shape.size;
  int saved_values = kind == Kind::kLstm ? 5 : kind == Kind::kGru ? 4 : 0;
  double weight = 1.5 / std::sqrt(static_cast<double>(shape.size));

  Buffer<S> p = random_buffer<S>(engine, points * units * gates, 2);
  Buffer<S> w = random_buffer<S>(engine, units * gates * shape.size, weight);
  Buffer<S> b = random_buffer<S>(engine, units* gates, 1);
  Buffer<S> h0 = random_buffer<S>(engine, states, 1);
  Buffer<S> c0 = random_buffer<S>(engine, states, 1);
  Buffer<S> grad_y = random_buffer<S>(engine, points* units, 1);
  Buffer<S> grad_h_n = random_buffer<S>(engine, states, 1);
  Buffer<S> grad_c_n = random_buffer<S>(engine, states, 1);
  Buffer<int64_t> lengths{shape.batch};

  Buffer<S> y = poisoned<S>(points * units), h_n = poisoned<S>(states), c_n = poisoned<S>(states);
  Buffer<S> saved = poisoned<S>(points * units * saved_values);
  Buffer<S> dp = poisoned<S>(points * units * gates), du = poisoned<S>(points * units * gates);
  Buffer<S> dh0 = poisoned<S>(states), dc0 = poisoned<S>(states);
  Buffer<S> dw = poisoned<S>(units * gates * shape.size);
  reference::Row expected_dw = reference::Row(static_cast<size_t>(dw.size), 0);

  int64_t stride_t(int64_t values) const {
    return batch_major ? units * values : shape.batch * units * values;
  }
  int64_t stride_b(int64_t values) const {
    return batch_major ? shape.steps * units * values : units * values;
  }
  template <class Pointer>
  cpu::Sequence<Pointer> sequence(Buffer<S>& buffer, int64_t values) {
    return {buffer.get(), stride_t(values), stride_b(values)};
  }

  template <class Cell>
  void run(int threads) {
    cpu::ForwardProblem f;
    f.shape = shape;
    f.threads = threads;
    f.lengths = with_lengths ? lengths.get() : nullptr;
    f.p = sequence<const void*>(p, gates);
    f.w_hh = w.get();
    f.b_hh = Cell::kRecurrentBias ? b.get() : nullptr;
    f.h0 = h0.get();
    f.carried0 = c0.get();
    f.y = sequence<void*>(y, 1);
    f.saved = sequence<void*>(saved, saved_values);
    f.h_n = h_n.get();
    f.carried_n = c_n.get();
    level::forward<Cell, S, S>(f);
    cpu::BackwardProblem g;
    g.shape = shape;
    g.threads = threads;
    g.lengths = f.lengths;
    g.grad_y = sequence<const void*>(grad_y, 1);
    g.grad_h_n = grad_h_n.get();
    g.grad_carried_n = grad_c_n.get();
    g.y = sequence<const void*>(y, 1);
    g.saved = sequence<const void*>(saved, saved_values);
    g.w_hh = w.get();
    g.h0 = h0.get();
    g.dp = sequence<void*>(dp, gates);
    g.du = sequence<void*>(du, gates);
    g.dw_hh = dw.get();
    g.dh0 = dh0.get();
    g.dcarried0 = Cell::kCarried ? dc0.get() : nullptr;
    level::backward<Cell, S>(g);
  }

  void launch(int threads) {
    using Math = level::Math<S>;
    switch (kind) {
      case Kind::kTanh:
        return run<cells::Elman<cells::Tanh, Math>>(threads);
      case Kind::kRelu:
        return run<cells::Elman<cells::Relu, Math>>(threads);
      case Kind::kSigmoid:
        return run<cells::Elman<cells::Sigmoid, Math>>(threads);
      case Kind::kLstm:
        return run<cells::Lstm<Math>>(threads);
      case Kind::kGru:
        return run<cells::Gru<Math>>(threads);
    }
  }

  void expect(const char* what, int64_t group, int64_t t, int64_t row, const S* actual,
              const double* expected, int64_t count) {
    // A whole sequence, not one step: contracting enough that errors stay near the unit roundoff.
    const double tolerance = sizeof(S) == 8 ? 1e-11 : 2e-3;
    for (int64_t i = 0; i < count; ++i) {
      const double want = expected != nullptr ? expected[i] : 0;
      const double error = std::fabs(static_cast<double>(actual[i]) - want);
      if (error <= tolerance * (1 + std::fabs(want))) continue;  // a NaN fails this too
      if (++failures < 20)
        std::printf(
            "%s kind %d T %ld B %ld S %ld D %ld heads %ld: group %ld t %ld b %ld i %ld: "
            "%g, expected %g\n",
            what, static_cast<int>(kind), shape.steps, shape.batch, shape.size, shape.directions,
            shape.heads, group, t, row, i, static_cast<double>(actual[i]), want);
      return;
    }
  }

  reference::Row row_of(const S* from, int64_t n) const { return reference::Row(from, from + n); }

  void check_row(int64_t group, int64_t row) {
    const int64_t n = shape.size, many = gates * n;
    const int64_t length = with_lengths ? lengths.data[row] : shape.steps;
    const bool reverse = group >= shape.heads;
    const int64_t state =
        ((group / shape.heads * shape.batch + row) * shape.heads + group % shape.heads) * n;
    const auto point = [&](int64_t t, int64_t values) {
      return t * stride_t(values) + row * stride_b(values) + group * values * n;
    };
    const reference::Row weights = row_of(w.get() + group * many * n, many * n);
    const reference::Row bias = row_of(b.get() + group * many, many);
    const reference::Layer layer{kind, n, weights.data(),
                                 kind == Kind::kGru ? bias.data() : nullptr};
    std::vector<reference::Step> steps(static_cast<size_t>(length));
    reference::Row h = row_of(h0.get() + state, n), c = row_of(c0.get() + state, n);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t t = reverse ? length - 1 - i : i;
      steps[i].p = row_of(p.get() + point(t, gates), many);
      steps[i].grad_y = row_of(grad_y.get() + point(t, 1), n);
      layer.forward(steps[i], h, c);
      h = steps[i].h;
      c = steps[i].c;
      expect("y", group, t, row, y.get() + point(t, 1), h.data(), n);
    }
    expect("h_n", group, 0, row, h_n.get() + state, h.data(), n);
    if (kind == Kind::kLstm) expect("c_n", group, 0, row, c_n.get() + state, c.data(), n);
    reference::Row dh = row_of(grad_h_n.get() + state, n), dc = row_of(grad_c_n.get() + state, n);
    for (int64_t i = length - 1; i >= 0; --i) {
      const int64_t t = reverse ? length - 1 - i : i;
      layer.backward(steps[i], dh, dc);
      expect("dp", group, t, row, dp.get() + point(t, gates), steps[i].dp.data(), many);
      if (kind == Kind::kGru)
        expect("du", group, t, row, du.get() + point(t, gates), steps[i].du.data(), many);
      for (int64_t j = 0; j < many; ++j)
        for (int64_t k = 0; k < n; ++k)
          expected_dw[(group * many + j) * n + k] += steps[i].du[j] * steps[i].h_prev[k];
    }
    expect("dh0", group, 0, row, dh0.get() + state, dh.data(), n);
    if (kind == Kind::kLstm) expect("dc0", group, 0, row, dc0.get() + state, dc.data(), n);
    for (int64_t t = length; t < shape.steps; ++t) {
      expect("padded y", group, t, row, y.get() + point(t, 1), nullptr, n);
      expect("padded dp", group, t, row, dp.get() + point(t, gates), nullptr, many);
    }
  }

  void check() {
    for (int64_t row = 0; row < shape.batch; ++row)
      lengths.data[row] = row == 0 ? shape.steps : row * 5 % (shape.steps + 1);
    launch(1);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t row = 0; row < shape.batch; ++row) check_row(group, row);
    expect("dw_hh", 0, 0, 0, dw.get(), expected_dw.data(), dw.size);
    std::vector<S> first(y.get(), y.get() + y.size), first_dp(dp.get(), dp.get() + dp.size);
    std::vector<S> first_dw(dw.get(), dw.get() + dw.size);
    for (int threads = 2; threads <= 3; ++threads) {
      launch(threads);
      if (std::memcmp(first.data(), y.get(), first.size() * sizeof(S)) != 0 ||
          std::memcmp(first_dp.data(), dp.get(), first_dp.size() * sizeof(S)) != 0 ||
          std::memcmp(first_dw.data(), dw.get(), first_dw.size() * sizeof(S)) != 0) {
        ++failures;
        std::printf("%d threads give other bits than one\n", threads);
      }
    }
  }
};

template <class S>
void check_kind(Kind kind) {
  int variant = 0;
  for (int64_t size : {1, 3, 17, 33, 65}) {
    for (int64_t batch : {1, 3, 7, 13, 21}) {
      for (int64_t steps : {1, 2, 9}) {
        ++variant;
        const cpu::Shape shape = {steps, batch, size, 1 + variant % 2, variant % 3 == 0 ? 3 : 1};
        Test<S>{kind, shape, variant % 4 >= 2, variant % 5 == 0}.check();
      }
    }
  }
}

// More points than one chunk of the weight gradient holds, and several of its tiles.
void check_long() {
  Test<float>{Kind::kTanh, {70, 9, 33, 1, 1}, true, false}.check();
  Test<double>{Kind::kGru, {150, 5, 17, 2, 1}, false, true}.check();
}

}  // namespace

int main() {
  for (Kind kind : {Kind::kTanh, Kind::kRelu, Kind::kSigmoid, Kind::kLstm, Kind::kGru}) {
    check_kind<double>(kind);
    check_kind<float>(kind);
  }
  check_long();
  std::printf(failures ? "%d failures\n" : "all kernels agree with the naive loop\n", failures);
  return failures != 0;
}
