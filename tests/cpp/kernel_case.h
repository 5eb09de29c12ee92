// One problem of the time loops: run through the kernels, and judged against the naive loop of
// reference.h, step by step. Every output starts as NaN.
#pragma once

#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

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
#include "leaky.h"
#include "reference.h"

namespace cpu = rnnfast::cpu;
namespace level = rnnfast::cpu::RNNFAST_LEVEL;
namespace cells = rnnfast::cells;
using reference::Kind;

template <>
constexpr bool kHalf<level::Float16> = true;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline int failures = 0;

struct Options {
  bool lengths = false;
  bool batch_major = false;
  bool reset = false;
  int64_t window = 0;
  double clip = kInfinity;
  bool norm = false;
  bool beta = false;
  bool recurrent = false;  // layer norm of u alone
  bool record = false;
  bool per_sample = false;
  bool nonfinite = false;
  bool cells = false;  // the carried state of each step, and a gradient of it
  int threads = 3;     // at most
};

template <class S>
struct Test {
  Kind kind;
  cpu::Shape shape;
  Options options;

  using A = level::Arithmetic<S>;
  using Data = Buffer<S>;

  int gates = reference::gates(kind);
  int64_t groups = shape.directions * shape.heads;
  int64_t units = groups * shape.size;
  int64_t points = shape.steps * shape.batch;
  int64_t states = shape.directions * shape.batch * shape.heads * shape.size;
  int saved_values = kind == Kind::kLstm    ? 5
                     : kind == Kind::kGru   ? 4
                     : kind == Kind::kLeaky ? 1
                                            : 0;
  int64_t record_rows = options.per_sample ? shape.batch : 1;
  double weight = 1.5 / std::sqrt(static_cast<double>(shape.size));

  Data p = Data::random(points * units * gates, 2);
  Data w = Data::random(units * gates * shape.size, weight), b = Data::random(units * gates, 1);
  Data h_0 = Data::random(states, 1), c_0 = Data::random(states, 1);
  Data grad_y = Data::random(points * units, 1);
  Data grad_h_n = Data::random(states, 1), grad_c_n = Data::random(states, 1);
  bool has_cells = options.cells && (kind == Kind::kLstm || kind == Kind::kLeaky);
  Data grad_cells = Data::random(has_cells ? points * units : 0, 1);
  Buffer<A> gamma = Buffer<A>::random(units * gates, 2);
  Buffer<A> beta = Buffer<A>::random(units * gates, 1), leak = Buffer<A>::random(units, 0.4);
  Buffer<int64_t> lengths{shape.batch};
  Buffer<std::uint8_t> reset{points};

  Data y{points * units}, h_n{states}, c_n{states}, saved{points * units * saved_values};
  Data cells{grad_cells.size};
  Data dp{points * units * gates}, du{points * units * gates}, dh_0{states}, dc_0{states};
  Data dw{units * gates * shape.size};
  Data ahat{options.norm ? points * units * gates : 0};
  Buffer<A> rstd{options.norm ? points * groups : 0};
  Buffer<A> dgamma{options.norm ? units * gates : 0}, dbeta{dgamma.size};
  Buffer<A> dleak{kind == Kind::kLeaky ? units : 0};
  Buffer<double> record{
      options.record ? shape.directions * shape.steps * record_rows * rnnfast::kFields : 0};

  reference::Row expected_dw = zeros(dw.size), expected_record = zeros(record.size);
  reference::Row expected_dgamma = zeros(dgamma.size), expected_dbeta = zeros(dbeta.size);
  reference::Row expected_dleak = zeros(dleak.size);

  static reference::Row zeros(int64_t n) { return reference::Row(static_cast<size_t>(n), 0); }

  // Calls body(buffer) for everything that a kernel writes but the record.
  template <class Body>
  void for_each_output(Body&& body) {
    for (Data* data : {&y, &h_n, &c_n, &saved, &cells, &dp, &du, &dh_0, &dc_0, &dw, &ahat})
      body(*data);
    for (Buffer<A>* data : {&rstd, &dgamma, &dbeta, &dleak}) body(*data);
  }
  std::string bits() {
    std::string all;
    for_each_output(
        [&](auto& data) { all.append(reinterpret_cast<const char*>(data.get()), data.bytes()); });
    return all;
  }

  int64_t stride_t(int64_t values) const {
    return options.batch_major ? units * values : shape.batch * units * values;
  }
  int64_t stride_b(int64_t values) const {
    return options.batch_major ? shape.steps * units * values : units * values;
  }
  template <class Pointer>
  cpu::Sequence<Pointer> sequence(Data& buffer, int64_t values) {
    return {buffer.get(), stride_t(values), stride_b(values)};
  }

  template <class Cell>
  cpu::ForwardProblem forward_problem(int threads) {
    cpu::ForwardProblem f;
    f.shape = shape;
    f.threads = threads;
    f.lengths = options.lengths ? lengths.get() : nullptr;
    f.reset = options.reset ? reset.get() : nullptr;
    f.p = sequence<const void*>(p, gates);
    f.w_hh = w.get();
    f.b_hh = Cell::kRecurrentBias ? b.get() : nullptr;
    f.h_0 = h_0.get();
    f.c_0 = c_0.get();
    f.y = sequence<void*>(y, 1);
    f.saved = sequence<void*>(saved, saved_values);
    if (has_cells) f.cells = sequence<void*>(cells, 1);
    f.h_n = h_n.get();
    f.c_n = c_n.get();
    if (options.norm) {
      f.gamma = gamma.get();
      f.beta = options.beta ? beta.get() : nullptr;
      f.norm_eps = kNormEps;
      f.norm_recurrent = options.recurrent;
      f.ahat = sequence<void*>(ahat, gates);
      f.rstd = rstd.get();
    }
    f.parameters = leak.get();
    return f;
  }

  // Without what only backward needs, the results are the same.
  template <class Cell>
  void infer(int threads) {
    cpu::ForwardProblem f = forward_problem<Cell>(threads);
    f.saved = {};
    level::forward(level::kPoints<Cell, S>, f);
  }

  template <class Cell>
  void run(int threads) {
    const cpu::ForwardProblem f = forward_problem<Cell>(threads);
    level::forward(level::kPoints<Cell, S>, f);
    cpu::BackwardProblem g;
    g.shape = shape;
    g.threads = threads;
    g.lengths = f.lengths;
    g.reset = f.reset;
    g.window = options.window;
    g.clip = options.clip;
    g.grad_y = sequence<const void*>(grad_y, 1);
    g.grad_h_n = grad_h_n.get();
    g.grad_c_n = grad_c_n.get();
    if (has_cells) g.grad_cells = sequence<const void*>(grad_cells, 1);
    g.y = sequence<const void*>(y, 1);
    g.saved = sequence<const void*>(saved, saved_values);
    g.w_hh = w.get();
    g.h_0 = h_0.get();
    g.dp = sequence<void*>(dp, gates);
    g.du = sequence<void*>(du, gates);
    g.dw_hh = dw.get();
    g.dh_0 = dh_0.get();
    g.dc_0 = kind == Kind::kLstm ? dc_0.get() : nullptr;
    if (options.norm) {
      g.gamma = gamma.get();
      g.beta = f.beta;
      g.norm_recurrent = options.recurrent;
      g.ahat = sequence<const void*>(ahat, gates);
      g.rstd = rstd.get();
      g.dgamma = dgamma.get();
      g.dbeta = dbeta.get();
    }
    g.record = options.record ? record.get() : nullptr;
    g.per_sample = options.per_sample;
    g.parameters = leak.get();
    g.dparameters = Cell::kParameters ? dleak.get() : nullptr;
    level::backward(level::kPoints<Cell, S>, g);
  }

  void launch(int threads, bool inference = false) {
    using Math = level::Math<A>;
    for_each_output([](auto& data) { data.poison(); });
    record.poison();
    const auto run = [&]<class Cell>() {
      return inference ? this->infer<Cell>(threads) : this->run<Cell>(threads);
    };
    switch (kind) {
      case Kind::kTanh:
        return run.template operator()<cells::Rnn<cells::Tanh, Math>>();
      case Kind::kRelu:
        return run.template operator()<cells::Rnn<cells::Relu, Math>>();
      case Kind::kSigmoid:
        return run.template operator()<cells::Rnn<cells::Sigmoid, Math>>();
      case Kind::kLstm:
        return run.template operator()<cells::Lstm<Math>>();
      case Kind::kGru:
        return run.template operator()<cells::Gru<Math>>();
      case Kind::kLeaky:
        return run.template operator()<cells::Leaky<Math>>();
    }
  }

  void fail(const char* what, int64_t group, int64_t t, int64_t row, int64_t i, double found,
            double wanted) {
    if (++failures >= 20) return;
    std::printf(
        "%s kind %d T %ld B %ld S %ld D %ld heads %ld of %ld bytes, lengths %d batch major %d "
        "reset %d window %ld clip %g norm %d beta %d recurrent %d record %d per sample %d cells "
        "%d: "
        "group %ld t %ld b %ld i %ld: %g, expected %g\n",
        what, static_cast<int>(kind), shape.steps, shape.batch, shape.size, shape.directions,
        shape.heads, sizeof(S), options.lengths, options.batch_major, options.reset, options.window,
        options.clip, options.norm, options.beta, options.recurrent, options.record,
        options.per_sample, options.cells, group, t, row, i, found, wanted);
  }

  // A NaN is as good as a NaN, but not as good as a number.
  static bool near(double found, double wanted, double tolerance) {
    return std::fabs(found - wanted) <= tolerance || found == wanted ||
           (std::isnan(found) && std::isnan(wanted));
  }

  template <class T>
  void expect(const char* what, int64_t group, int64_t t, int64_t row, const T* actual,
              const double* expected, int64_t count, double terms = 1) {
    // A whole sequence, not one step: contracting enough that errors stay near the unit roundoff.
    double tolerance = sizeof(S) == 8 ? 1e-11 : sizeof(S) == 4 ? 2e-3 : 6e-2;
    if (sizeof(S) == 2) tolerance *= std::sqrt(terms);  // each is rounded on its own
    for (int64_t i = 0; i < count; ++i) {
      const double found = value(actual[i]), wanted = expected != nullptr ? expected[i] : 0;
      const double most = expected != nullptr ? tolerance * (1 + std::fabs(wanted)) : 0;
      if (near(found, wanted, most)) continue;
      return fail(what, group, t, row, i, found, wanted);
    }
  }

  static reference::Row row_of(const S* from, int64_t n) {
    reference::Row row = zeros(n);
    for (int64_t i = 0; i < n; ++i) row[i] = value(from[i]);
    return row;
  }

  int64_t length(int64_t row) const { return options.lengths ? lengths.data[row] : shape.steps; }

  // Whether state and gradient, or the gradient alone, end between real steps edge - 1 and edge.
  bool cut(int64_t edge, int64_t row) const {
    return options.reset && edge < length(row) && reset.data[edge * shape.batch + row];
  }
  bool stops(int64_t edge, int64_t row) const {
    const bool inside = edge > 0 && edge < length(row);
    return cut(edge, row) || (inside && options.window > 0 && edge % options.window == 0);
  }

  void add_to_record(const reference::Layer& layer, const reference::Step& step, int64_t group,
                     int64_t t, int64_t row) {
    const int64_t place = (group / shape.heads * shape.steps + t) * record_rows;
    double* const sums = &expected_record[(place + row % record_rows) * rnnfast::kFields];
    const bool reverse = group >= shape.heads, enters = t == (reverse ? 0 : length(row) - 1);
    const bool carried = !enters && !stops(reverse ? t : t + 1, row);
    for (int64_t i = 0; i < shape.size; ++i) {
      const double dh = step.dh[i], h = step.h[i], dc = layer.beside() ? step.dc[i] : 0;
      bool finite = std::isfinite(dh) && std::isfinite(dc);
      for (int g = 0; g < gates; ++g) {
        const double dp = step.dp[g * shape.size + i];
        sums[rnnfast::kPreactSquares] += dp * dp;
        finite = finite && std::isfinite(dp);
      }
      sums[rnnfast::kStateSquares] += dh * dh + dc * dc;
      sums[rnnfast::kCarrySquares] += step.carry[i] * step.carry[i];
      sums[rnnfast::kClippedSquares] += step.clipped[i] * step.clipped[i];
      for (double x : {dh, dc})
        if (std::isnan(x) || std::fabs(x) > sums[rnnfast::kStateMax])
          sums[rnnfast::kStateMax] = std::fabs(x);
      if (layer.beside()) {
        const double carry_c = step.carry_c[i], clipped_c = step.clipped_c[i];
        sums[rnnfast::kCarrySquares] += carry_c * carry_c;
        sums[rnnfast::kClippedSquares] += clipped_c * clipped_c;
        sums[rnnfast::kCellSquares] += step.total_c[i] * step.total_c[i];
        sums[rnnfast::kCellCarrySquares] += carry_c * carry_c;
      }
      sums[rnnfast::kSlopes] += layer.gain(step, i);
      sums[rnnfast::kNonfiniteGrad] += !finite;
      sums[rnnfast::kNonfiniteState] += !std::isfinite(h);
      sums[rnnfast::kEntries] += 1;
      sums[rnnfast::kCarried] += carried;
    }
  }

  void check_row(int64_t group, int64_t row) {
    const int64_t n = shape.size, many = gates * n, end = length(row);
    const bool reverse = group >= shape.heads;
    const int64_t state =
        ((group / shape.heads * shape.batch + row) * shape.heads + group % shape.heads) * n;
    const auto point = [&](int64_t t, int64_t values) {
      return t * stride_t(values) + row * stride_b(values) + group * values * n;
    };
    const auto time = [&](int64_t i) { return reverse ? end - 1 - i : i; };
    const auto edge_before = [&](int64_t t) { return reverse ? t + 1 : t; };
    const reference::Row weights = row_of(w.get() + group * many * n, many * n);
    const reference::Row bias = row_of(b.get() + group * many, many);
    const reference::Row scale(gamma.get() + group * many, gamma.get() + (group + 1) * many);
    const reference::Row shift(beta.get() + group * many, beta.get() + (group + 1) * many);
    const reference::Row leaks(leak.get() + group * n, leak.get() + (group + 1) * n);
    const bool leaky = kind == Kind::kLeaky;
    const reference::Layer layer{kind,
                                 n,
                                 weights.data(),
                                 kind == Kind::kGru ? bias.data() : nullptr,
                                 options.norm ? scale.data() : nullptr,
                                 options.beta ? shift.data() : nullptr,
                                 kNormEps,
                                 options.clip,
                                 options.recurrent,
                                 leaks.data()};
    std::vector<reference::Step> steps(static_cast<size_t>(end));
    reference::Row h = row_of(h_0.get() + state, n), c = row_of(c_0.get() + state, n);
    if (leaky) {
      c = h;
      h = layer.emit(c);
    }
    const reference::Row first = h;
    for (int64_t i = 0; i < end; ++i) {
      const int64_t t = time(i);
      if (cut(edge_before(t), row)) {
        c = zeros(n);
        h = leaky ? layer.emit(c) : c;
      }
      steps[i].p = row_of(p.get() + point(t, gates), many);
      steps[i].grad_y = row_of(grad_y.get() + point(t, 1), n);
      steps[i].grad_c = has_cells ? row_of(grad_cells.get() + point(t, 1), n) : zeros(n);
      layer.forward(steps[i], h, c);
      h = steps[i].h;
      c = steps[i].c;
      expect("y", group, t, row, y.get() + point(t, 1), h.data(), n);
      expect("saved", group, t, row, saved.get() + point(t, saved_values), steps[i].saved.data(),
             saved_values * n);
      if (has_cells) expect("cells", group, t, row, cells.get() + point(t, 1), c.data(), n);
      if (!options.norm) continue;
      expect("ahat", group, t, row, ahat.get() + point(t, gates), steps[i].ahat.data(), many);
      expect("rstd", group, t, row, rstd.get() + (t * shape.batch + row) * groups + group,
             &steps[i].rstd, 1);
    }
    expect("h_n", group, 0, row, h_n.get() + state, leaky ? c.data() : h.data(), n);
    if (kind == Kind::kLstm) expect("c_n", group, 0, row, c_n.get() + state, c.data(), n);
    reference::Row dh = row_of(grad_h_n.get() + state, n), dc = row_of(grad_c_n.get() + state, n);
    if (leaky) {
      dc = dh;
      dh = zeros(n);
    }
    if (end > 0) {  // the last step's gradient does not come through time
      for (int64_t i = 0; i < n; ++i) steps[end - 1].grad_y[i] += dh[i];
      dh = zeros(n);
      for (int64_t i = 0; layer.beside() && i < n; ++i) steps[end - 1].grad_c[i] += dc[i];
      if (layer.beside()) dc = dh;
    }
    for (int64_t i = end - 1; i >= 0; --i) {
      const int64_t t = time(i);
      layer.backward(steps[i], dh, dc);
      if (stops(edge_before(t), row)) dh = dc = zeros(n);
      expect("dp", group, t, row, dp.get() + point(t, gates), steps[i].dp.data(), many);
      if (options.norm ? options.recurrent : kind == Kind::kGru)
        expect("du", group, t, row, du.get() + point(t, gates), steps[i].du.data(), many);
      for (int64_t j = 0; j < many; ++j)
        for (int64_t k = 0; k < n; ++k)
          expected_dw[(group * many + j) * n + k] += steps[i].du[j] * steps[i].h_prev[k];
      for (int64_t j = 0; options.norm && j < many; ++j) {
        expected_dgamma[group * many + j] += steps[i].dn[j] * steps[i].ahat[j];
        expected_dbeta[group * many + j] += steps[i].dn[j];
      }
      for (int64_t j = 0; leaky && j < n; ++j) expected_dleak[group * n + j] += steps[i].dleak[j];
      if (options.record) add_to_record(layer, steps[i], group, t, row);
    }
    for (int64_t i = 0; leaky && i < n; ++i) dh[i] = dc[i] + dh[i] * first[i] * (1 - first[i]);
    expect("dh_0", group, 0, row, dh_0.get() + state, dh.data(), n);
    if (kind == Kind::kLstm) expect("dc_0", group, 0, row, dc_0.get() + state, dc.data(), n);
    for (int64_t t = end; t < shape.steps; ++t) {
      expect("padded y", group, t, row, y.get() + point(t, 1), nullptr, n);
      expect("padded saved", group, t, row, saved.get() + point(t, saved_values), nullptr,
             saved_values * n);
      if (has_cells) expect("padded cells", group, t, row, cells.get() + point(t, 1), nullptr, n);
      expect("padded dp", group, t, row, dp.get() + point(t, gates), nullptr, many);
      if (!options.norm) continue;
      expect("padded ahat", group, t, row, ahat.get() + point(t, gates), nullptr, many);
      expect("padded rstd", group, t, row, rstd.get() + (t * shape.batch + row) * groups + group,
             nullptr, 1);
    }
  }

  // Sums over the batch or over a crew are taken in an order that depends on the threads; the
  // slopes of a row are summed in the arithmetic type.
  void check_record(const reference::Row& first, int threads) {
    const bool same =
        options.per_sample && level::make_plan(shape, gates, level::kLanes<A>, threads).parts == 1;
    for (int64_t i = 0; i < record.size; ++i) {
      const int64_t field = i % rnnfast::kFields, point = i / rnnfast::kFields;
      const double close = field == rnnfast::kSlopes && sizeof(A) == 4 ? 1e-6 : 1e-13;
      if (!near(record.at(i), first[i], same ? 0 : close * std::fabs(first[i])))
        fail("other record with more threads", 0, point / record_rows, point % record_rows, field,
             record.at(i), first[i]);
    }
  }

  void check_inference() {
    const auto results = [&] {
      std::string all;
      for (Data* data : {&y, &h_n, &c_n, &cells})
        all.append(reinterpret_cast<const char*>(data->get()), data->bytes());
      return all;
    };
    const std::string trained = results();
    launch(options.threads, true);
    if (results() != trained) fail("other bits in inference", 0, 0, 0, 0, 0, 0);
    for (int64_t i = 0; i < saved.size; ++i)
      if (!std::isnan(saved.at(i))) return fail("saved in inference", 0, 0, 0, i, saved.at(i), 0);
  }

  void check() {
    for (int64_t row = 0; row < shape.batch; ++row)
      lengths.data[row] = row == 0 ? shape.steps : row * 5 % (shape.steps + 1);
    for (int64_t i = 0; i < points; ++i) reset.data[i] = pick(4) == 0;
    for (int64_t i = 0; i < units; ++i) leak.data[i] += A(0.5);
    if (options.nonfinite) {
      const double bad[] = {std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity};
      for (Data* data : {&p, &grad_y}) data->data[pick(data->size)] = stored<S>(bad[pick(3)]);
    }
    launch(options.nonfinite ? options.threads : 1);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t row = 0; row < shape.batch; ++row) check_row(group, row);
    const double sum = static_cast<double>(points);
    expect("dw_hh", 0, 0, 0, dw.get(), expected_dw.data(), dw.size, sum);
    expect("dgamma", 0, 0, 0, dgamma.get(), expected_dgamma.data(), dgamma.size, sum);
    expect("dbeta", 0, 0, 0, dbeta.get(), expected_dbeta.data(), dbeta.size, sum);
    expect("dleak", 0, 0, 0, dleak.get(), expected_dleak.data(), dleak.size);
    expect("record", 0, 0, 0, record.get(), expected_record.data(), record.size);
    if (options.nonfinite) return;  // the sign of a NaN is nobody's
    const std::string first = bits();
    const reference::Row first_record(record.get(), record.get() + record.size);
    check_inference();
    for (int threads = 2; threads <= options.threads; ++threads) {
      launch(threads);
      if (bits() != first) fail("other bits with more threads", 0, 0, 0, threads, 0, 0);
      check_record(first_record, threads);
    }
  }

  static constexpr double kNormEps = 0.1;
};
