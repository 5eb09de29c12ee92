// How far the functions of csrc/cpu/math.h are from the exact values, at one SIMD level. It is
// built as kernel_test.cpp is. With an argument it takes every n-th float: 1 is all of them. GCC
// fuses no multiplication with an addition at -O1: test_cpu_kernel.py is the test of what is fused.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

#include "../../csrc/cpu/math.h"

namespace level = rnnfast::cpu::RNNFAST_LEVEL;

namespace {

enum class Function { kTanh, kSigmoid, kSoftplus, kOneMinusExp };

int failures = 0;

// One type up. Where long double is no wider than double, its own error is in the limit.
template <class A>
struct Judge;
template <>
struct Judge<float> {
  using Wide = double;
  using Bits = std::uint32_t;
  static constexpr double kLimit = 2;
};
template <>
struct Judge<double> {
  using Wide = long double;
  using Bits = std::uint64_t;
  static constexpr double kLimit = LDBL_MANT_DIG > DBL_MANT_DIG ? 2 : 3;
};

template <class A>
typename Judge<A>::Wide exact(Function function, A x) {
  const typename Judge<A>::Wide wide = x;
  switch (function) {
    case Function::kTanh:
      return std::tanh(wide);
    case Function::kSigmoid:
      return 1 / (1 + std::exp(-wide));
    case Function::kSoftplus:
      return (wide < 0 ? 0 : wide) + std::log1p(std::exp(-std::abs(wide)));
    case Function::kOneMinusExp:
      return -std::expm1(-wide);
  }
  return 0;
}

template <class A>
typename Judge<A>::Wide ulp_of(typename Judge<A>::Wide value) {
  using Limits = std::numeric_limits<A>;
  if (std::abs(value) < Limits::min()) return Limits::denorm_min();
  return std::ldexp(typename Judge<A>::Wide(1), std::ilogb(value) + 1 - Limits::digits);
}

template <class A>
struct Sweep {
  static constexpr int L = level::kLanes<A>;
  explicit Sweep(Function f) : function(f) {}
  Function function;
  double worst = 0;
  A at = 0;
  A in[L] = {};
  int filled = 0;

  void add(A x) {
    in[filled++] = x;
    if (filled == L) flush();
  }

  void flush() {
    for (; filled < L; ++filled) in[filled] = 0;
    filled = 0;
    const level::Vec<A> x = level::load_raw(in);
    A out[L];
    level::store_raw(out, computed(x));
    for (int i = 0; i < L; ++i) check(in[i], out[i]);
  }

  level::Vec<A> computed(level::Vec<A> x) const {
    switch (function) {
      case Function::kTanh:
        return level::Math<A>::tanh(x);
      case Function::kSigmoid:
        return level::Math<A>::sigmoid(x);
      case Function::kSoftplus:
        return level::Math<A>::softplus(x);
      case Function::kOneMinusExp:
        return level::Math<A>::one_minus_exp(x);
    }
    return x;
  }

  void check(A x, A y) {
    if (function == Function::kOneMinusExp && x < 0) return;  // not in its domain
    if (std::isnan(x) || std::isnan(y)) return expect(std::isnan(x) && std::isnan(y), x, y);
    const bool negative = function == Function::kTanh && std::signbit(x);
    const bool bounded = std::abs(y) <= 1 || function == Function::kSoftplus;
    const bool minus_zero = x == 0 && function == Function::kOneMinusExp;
    expect(bounded && (std::signbit(y) == negative || minus_zero), x, y);
    if (std::isinf(x) && y == x) return;
    const auto right = exact(function, x);
    const double error = static_cast<double>(std::abs(y - right) / ulp_of<A>(right));
    if (error > worst) {
      worst = error;
      at = x;
    }
  }

  void expect(bool holds, A x, A y) {
    if (holds) return;
    ++failures;
    std::printf("f(%a) = %a\n", static_cast<double>(x), static_cast<double>(y));
  }

  void report(const char* name) {
    flush();
    const bool good = worst <= Judge<A>::kLimit;
    failures += !good;
    std::printf("%s%s of %zu bytes: %.3f ulp at %a\n", good ? "" : "FAILED: ", name, sizeof(A),
                worst, static_cast<double>(at));
  }
};

template <class A>
void add_neighbours(Sweep<A>& sweep, double centre, int count) {
  for (const double sign : {-1.0, 1.0}) {
    A up = static_cast<A>(sign * centre), down = up;
    for (int i = 0; i < count; ++i) {
      sweep.add(up);
      sweep.add(down);
      up = std::nextafter(up, std::numeric_limits<A>::infinity());
      down = std::nextafter(down, -std::numeric_limits<A>::infinity());
    }
  }
}

// Where the kernels or their results change: special values, limits, seams of the reduction.
template <class A>
void add_seams(Sweep<A>& sweep) {
  using Limits = std::numeric_limits<A>;
  for (const A x : {A(0), Limits::infinity(), Limits::quiet_NaN(), Limits::denorm_min(),
                    Limits::min(), Limits::max(), Limits::epsilon()}) {
    sweep.add(x);
    sweep.add(-x);
  }
  for (const double x : {0.5625, 9.0109, 10.0, 18.0, 19.0616, 20.0, 36.75, 38.0, 87.3365, 88.7228,
                         103.279, 103.972, 104.0, 708.396, 709.783, 744.4401, 745.1332, 746.0})
    add_neighbours(sweep, x, 200);
  for (int n = 0; n < 2200; ++n) add_neighbours(sweep, (n + 0.5) * 0.34657359027997264, 8);
}

template <class A>
void add_random(Sweep<A>& sweep, int count) {
  std::mt19937_64 engine(2);
  std::uniform_real_distribution<A> uniform(-1, 1);
  const A ranges[] = {A(0.2), 1, 12, 40, sizeof(A) == 4 ? A(110) : A(760)};
  for (int i = 0; i < count; ++i) {
    for (const A range : ranges) sweep.add(range * uniform(engine));
    const auto bits = static_cast<typename Judge<A>::Bits>(engine());
    sweep.add(level::bit_cast<A>(bits));
  }
}

void sweep_all(Function function, const char* name, std::uint64_t stride) {
  Sweep<float> floats(function);
  for (std::uint64_t bits = 0; bits < std::uint64_t(1) << 32; bits += stride)
    floats.add(level::bit_cast<float>(static_cast<std::uint32_t>(bits)));
  add_seams(floats);
  add_random(floats, 100000);
  floats.report(name);
  Sweep<double> doubles(function);
  add_seams(doubles);
  add_random(doubles, 200000);
  doubles.report(name);
}

}  // namespace

int main(int count, char** arguments) {
  const std::uint64_t stride = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 2003;
  if (stride == 0) return 2;
  sweep_all(Function::kTanh, "tanh", stride);
  sweep_all(Function::kSigmoid, "sigmoid", stride);
  sweep_all(Function::kSoftplus, "softplus", stride);
  sweep_all(Function::kOneMinusExp, "1 - exp(-x)", stride);
  return failures != 0;
}
