// The CUDA kernels, of one block, of clusters and of a launch a step, on the host, against naive
// recurrences in double: every mix of options, odd sizes, parts of a slice, outputs that start as
// NaN, memory between the rows that must stay as it was. With fibers in many orders of the threads;
// with threads under the sanitizers.
//
//   kernel_test [PROBLEMS [CONFIGURATION [KERNEL FILE LINE CHANGE]]]
//
// For one configuration it lists where faults can be planted, or plants one: then 0 means that
// nobody has noticed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <type_traits>
#include <vector>

#include "../../../csrc/cuda/host/plan.cpp"
#include "../../../csrc/cuda/record/measure.cuh"
#include "../../../csrc/cuda/resident/backward.cuh"
#include "../../../csrc/cuda/resident/forward.cuh"
#include "../../../csrc/cuda/streaming/product.cuh"
#define RNNFAST_MODE exact
#define RNNFAST_MODE_TYPE Exact
#define RNNFAST_MODE_VALUE Mode::kExact
#include "../../../csrc/cuda/streaming/kernels.cu"
#undef RNNFAST_MODE
#undef RNNFAST_MODE_TYPE
#undef RNNFAST_MODE_VALUE
#define RNNFAST_MODE bfloat16
#define RNNFAST_MODE_TYPE Half<BFloat16>
#define RNNFAST_MODE_VALUE Mode::kBFloat16
#include "../../../csrc/cuda/streaming/kernels.cu"
#undef RNNFAST_MODE
#undef RNNFAST_MODE_TYPE
#undef RNNFAST_MODE_VALUE
#include "../buffer.h"
#include "../reference.h"

namespace cuda = rnnfast::cuda;
namespace emulation = rnnfast::emulation;
using rnnfast::Field;

namespace {

int failures = 0;
int wanted = -1;  // the configuration; -1: all
emulation::Fault fault;

// The next launches are of this kernel.
void plan(const char* kernel) {
  if (wanted >= 0) emulation::plan(kernel, fault);
}

// Whether that kernel is to be given wrong arguments.
bool wrong(const char* change) {
  return emulation::planning && emulation::planted("arguments", 0, change);
}

// Spoils an argument that all kernels have.
template <class Problem>
void spoil(Problem& problem) {
  if (wrong("a step too few")) --problem.shape.steps;
  if (wrong("a row too few")) --problem.shape.batch;
  if (problem.lengths != nullptr && wrong("no lengths")) problem.lengths = nullptr;
  if (wrong("resets a step late")) problem.reset += problem.shape.batch;
}

struct Sizes {
  int T, B, S, D, heads, columns;
  bool norm, lengths, reset, h_0, grad_h_n, measured;
  int window;
  float limit;
  cuda::Nonlinearity f;
  bool large;  // some gradients, which are clipped
};

reference::Kind kind_of(cuda::Nonlinearity f) {
  if (f == cuda::Nonlinearity::kTanh) return reference::Kind::kTanh;
  return f == cuda::Nonlinearity::kRelu ? reference::Kind::kRelu : reference::Kind::kSigmoid;
}

// As Kernel, of the streaming kernel.
template <class Mode_, int kTiles_, int kSlices_>
struct Streamed {
  using Mode = Mode_;
  using Stored = typename Mode::Stored;
  static constexpr int kUnits = 48;  // that are tried
  static constexpr cuda::StreamedBlock kBlock = {kTiles_, kSlices_};
};

template <class K>
concept is_streamed = requires { K::kBlock; };

template <class K>
struct Test {
  using S = typename K::Stored;
  using Data = Buffer<S>;
  Sizes n;
  int G = n.D * n.heads, width = G * n.S;
  int64_t step = (n.B + 1) * width;  // one row more than there is, which nobody may touch
  int64_t states = static_cast<int64_t>(n.D) * n.B * n.heads * n.S;
  int slices = (n.B + n.columns - 1) / n.columns;
  Data p = Data::random(n.T * step, 1), w_hh = Data::random(int64_t{width} * n.S, 0.3);
  Data h_0 = Data::random(states, 1), grad_y = Data::random(n.T * step, 1);
  Data grad_h_n = Data::random(states, 1);
  Buffer<float> gamma = Buffer<float>::random(width, 1), beta = Buffer<float>::random(width, 1);
  std::vector<int64_t> lengths = {};
  std::vector<std::uint8_t> reset = {};
  Data y{n.T * step}, ahat{n.T * step}, dp{n.T * step}, h_n{states}, dh_0{states};
  Buffer<float> rstd{int64_t{n.T} * n.B * G}, dgamma{int64_t{slices} * width},
      dbeta{int64_t{slices} * width};
  Buffer<float> carry{int64_t{n.T} * n.B * width};
  Buffer<double> measured{int64_t{n.D} * n.T * n.B * rnnfast::kFields};
  Buffer<double> of_batch{int64_t{n.D} * n.T * rnnfast::kFields};
  const char* name;

  void check(const char* what, double found, double wanted, double size = 1) {
    const bool exact = std::is_same_v<typename K::Mode, cuda::Exact>;
    const double rounding = sizeof(S) == 2 ? 0.06 : exact ? 1e-4 : 0.02;
    if (std::fabs(found - wanted) <= rounding * (size + std::fabs(wanted))) return;
    if (++failures > 10) return;
    std::printf(
        "%s T%d B%d S%d D%d heads%d columns%d norm%d lengths%d reset%d window%d limit%g f%d "
        "large%d: %s is %g, wanted %g\n",
        name, n.T, n.B, n.S, n.D, n.heads, n.columns, n.norm, n.lengths, n.reset, n.window, n.limit,
        static_cast<int>(n.f), n.large, what, found, wanted);
  }

  template <class Kernel>
  void launch(std::size_t shared, Kernel kernel) {
    emulation::launch({slices * K::kBlocks, G, K::kThreads, K::kBlocks, shared}, kernel);
  }

  // By the launcher of the product.
  template <class Problem>
  void stream(const Problem& problem) {
    cuda::Plan plan;
    plan.family = cuda::Family::kStreaming;
    plan.streamed = K::kBlock;
    plan.slices = slices;
    constexpr bool kForward = std::is_same_v<Problem, cuda::Forward>;
    if constexpr (std::is_same_v<typename K::Mode, cuda::Exact>) {
      if constexpr (kForward) cuda::exact::streaming::forward(plan, problem, {});
      if constexpr (!kForward) cuda::exact::streaming::backward(plan, problem, {});
    } else {
      if constexpr (kForward) cuda::bfloat16::streaming::forward(plan, problem, {});
      if constexpr (!kForward) cuda::bfloat16::streaming::backward(plan, problem, {});
    }
  }

  void run() {
    for (int b = 0; b < n.B; ++b) lengths.push_back(n.lengths ? pick(n.T + 1) : n.T);
    // One step more than there is, for kernels that are a step late.
    for (int i = 0; i < (n.T + 1) * n.B; ++i) reset.push_back(n.reset && pick(3) == 0);
    for (int64_t point = 0; n.large && point < int64_t{n.T} * n.B; ++point) {
      if (pick(3) > 0) continue;
      // Where da is no number of its type, or sums over the units are none, before it is clipped.
      const bool largest = pick(2) == 0;
      S* row = grad_y.get() + point / n.B * step + point % n.B * width;
      for (int i = 0; i < width; ++i) {
        const double x = value(row[i]);
        row[i] = stored<S>(largest ? std::copysign(0x1.fp127, x) : x * 0x1p16);
      }
    }
    cuda::Forward f;
    f.shape = {n.T, n.B, n.S, n.heads, G, n.S % 2 == 0, n.columns, 1.0f / n.S};
    f.nonlinearity = n.f;
    f.norm_eps = 1e-3f;
    f.p = {p.get(), step, width};
    f.w_hh = w_hh.get();
    f.gamma = n.norm ? gamma.get() : nullptr;
    f.beta = n.norm ? beta.get() : nullptr;
    f.h_0 = n.h_0 ? h_0.get() : nullptr;
    f.lengths = n.lengths ? lengths.data() : nullptr;
    f.reset = n.reset ? reset.data() : nullptr;
    f.y = {y.get(), step, width};
    f.h_n = h_n.get();
    f.ahat = {ahat.get(), step, width};
    f.rstd = rstd.get();
    Buffer<float> workspace(is_streamed<K> ? 1 << 16 : 0);
    f.workspace = workspace.get();
    plan("forward");
    forward(f);
    cuda::Backward g = arguments(f);
    g.workspace = workspace.get();
    plan("backward");
    backward(g);
    if (n.measured) measure(g);
    judge();
  }

  void forward(cuda::Forward f) {
    if (f.reset != nullptr) spoil(f);
    if (wrong("p of another row")) f.p.data = static_cast<const S*>(f.p.data) + width;
    if (n.h_0 && wrong("no h_0")) f.h_0 = nullptr;
    if (n.norm && wrong("no offset")) f.beta = nullptr;
    if (n.norm && wrong("another eps")) f.norm_eps *= 100;
    if constexpr (is_streamed<K>) {
      stream(f);
    } else if (n.norm) {
      launch(K::kForwardBytes, [f] { cuda::forward_kernel<K, true>(f); });
    } else {
      launch(K::kForwardBytes, [f] { cuda::forward_kernel<K, false>(f); });
    }
  }

  cuda::Backward arguments(const cuda::Forward& f) {
    cuda::Backward g;
    g.shape = f.shape;
    g.nonlinearity = n.f;
    g.window = n.window;
    g.clip = n.limit;
    g.recompute_state = sizeof(S) == 2;
    g.grad_y = {grad_y.get(), step, width};
    g.grad_h_n = n.grad_h_n ? grad_h_n.get() : nullptr;
    g.y = {y.get(), step, width};
    g.w_hh = w_hh.get();
    g.gamma = f.gamma;
    g.beta = f.beta;
    g.ahat = {ahat.get(), step, width};
    g.rstd = rstd.get();
    g.lengths = f.lengths;
    g.reset = f.reset;
    g.dp = {dp.get(), step, width};
    g.dh_0 = dh_0.get();
    g.dgamma = dgamma.get();
    g.dbeta = dbeta.get();
    g.carry = n.measured ? carry.get() : nullptr;
    return g;
  }

  void backward(cuda::Backward g) {
    if (g.reset != nullptr) spoil(g);
    if (wrong("grad_y of another row"))
      g.grad_y.data = static_cast<const S*>(g.grad_y.data) + width;
    if (n.grad_h_n && wrong("no grad_h_n")) g.grad_h_n = nullptr;
    if (n.norm && wrong("ahat of another row"))
      g.ahat.data = static_cast<const S*>(g.ahat.data) + width;
    if (n.window > 0 && wrong("another window")) ++g.window;
    if (n.limit > 0 && wrong("another limit")) g.clip *= 2;
    if constexpr (is_streamed<K>) {
      stream(g);
    } else {
      const bool clips = n.limit > 0;
      launch(K::kBackwardBytes, [this, g, clips] {
        if (n.norm && clips) return cuda::backward_kernel<K, true, true>(g);
        if (n.norm) return cuda::backward_kernel<K, true, false>(g);
        if (clips) return cuda::backward_kernel<K, false, true>(g);
        cuda::backward_kernel<K, false, false>(g);
      });
    }
  }

  void measure(const cuda::Backward& g) {
    cuda::Measured m;
    m.shape = g.shape;
    m.nonlinearity = g.nonlinearity;
    m.window = g.window;
    m.clip = g.clip;
    m.per_sample = true;
    m.carry = carry.get();
    m.grad_y = g.grad_y;
    m.grad_h_n = g.grad_h_n;
    m.y = g.y;
    m.dp = {g.dp.data, step, width};
    m.lengths = g.lengths;
    m.reset = g.reset;
    m.record = measured.get();
    plan("record");
    if (m.reset != nullptr) spoil(m);
    if (n.window > 0 && wrong("another window")) ++m.window;
    if (n.limit > 0 && wrong("another limit")) m.clip *= 2;
    emulation::launch(
        {n.T, n.D, 32 * cuda::kMeasureWarps, 1, cuda::kMeasureWarps * sizeof(cuda::Row)},
        [m] { cuda::measure_kernel<S>(m); });
    plan("record of the batch");
    m.per_sample = false;
    m.record = of_batch.get();
    emulation::launch(
        {n.T, n.D, 32 * cuda::kMeasureWarps, 1, cuda::kMeasureWarps * sizeof(cuda::Row)},
        [m] { cuda::measure_kernel<S>(m); });
  }

  void judge() {
    for (int64_t t = 0; t < n.T; ++t) {  // the row between
      for (int i = 0; i < width; ++i) {
        const int64_t at = t * step + static_cast<int64_t>(n.B) * width + i;
        if (!std::isnan(y.at(at)) || !std::isnan(dp.at(at))) check("a row beyond the batch", 1, 0);
      }
    }
    std::vector<double> gains(width), offsets(width);
    for (int group = 0; group < G; ++group) {
      for (int b = 0; b < n.B; ++b) judge_row(group, b, gains, offsets);
    }
    for (int64_t at = 0; n.measured && at < int64_t{n.D} * n.T * rnnfast::kFields; ++at) {
      const int64_t step = at / rnnfast::kFields * n.B, field = at % rnnfast::kFields;
      double sum = 0, most = 0;
      for (int64_t row = step; row < step + n.B; ++row) {
        sum += measured.at(row * rnnfast::kFields + field);
        most = std::fmax(most, measured.at(row * rnnfast::kFields + field));
      }
      check("the record of the batch", of_batch.at(at), field == rnnfast::kStateMax ? most : sum);
    }
    if (!n.norm) return;
    for (int i = 0; i < width; ++i) {
      double gain = 0, offset = 0;
      for (int s = 0; s < slices; ++s) {
        gain += dgamma.at(s * width + i);
        offset += dbeta.at(s * width + i);
      }
      check("dgamma", gain, gains[i], 3);
      check("dbeta", offset, offsets[i], 3);
    }
  }

  void judge_row(int group, int b, std::vector<double>& gains, std::vector<double>& offsets) {
    const int d = group / n.heads, first = group * n.S, length = static_cast<int>(lengths[b]);
    const int64_t state =
        (static_cast<int64_t>(d) * n.B + b) * n.heads * n.S + group % n.heads * n.S;
    reference::Row w(static_cast<size_t>(n.S) * n.S), gain(n.S), offset(n.S);
    for (int i = 0; i < n.S * n.S; ++i) w[i] = w_hh.at(int64_t{group} * n.S * n.S + i);
    for (int i = 0; i < n.S; ++i) gain[i] = gamma.at(first + i), offset[i] = beta.at(first + i);
    const reference::Layer layer = {kind_of(n.f),
                                    n.S,
                                    w.data(),
                                    nullptr,
                                    n.norm ? gain.data() : nullptr,
                                    n.norm ? offset.data() : nullptr,
                                    static_cast<double>(1e-3f),
                                    n.limit > 0 ? n.limit : HUGE_VAL};
    const auto cut = [&](int e) { return e >= 0 && e < length && reset[e * n.B + b] != 0; };
    const auto edge = [&](int e) {
      return cut(e) || (n.window > 0 && e > 0 && e < length && e % n.window == 0);
    };
    reference::Row h(n.S), none;
    for (int i = 0; i < n.S; ++i) h[i] = n.h_0 ? h_0.at(state + i) : 0;
    std::vector<reference::Step> steps(n.T);
    for (int k = 0; k < length; ++k) {
      const int t = d ? length - 1 - k : k;
      reference::Step& s = steps[t];
      for (int i = 0; i < n.S; ++i) s.p.push_back(p.at(t * step + int64_t{b} * width + first + i));
      layer.forward(s, cut(t + d) ? reference::Row(n.S, 0) : h, none);
      h = s.h;
    }
    for (int i = 0; i < n.S; ++i) check("h_n", h_n.at(state + i), h[i]);
    reference::Row dh(n.S, 0);
    for (int k = length - 1; k >= 0; --k) {
      const int t = d ? length - 1 - k : k;
      reference::Step& s = steps[t];
      for (int i = 0; i < n.S; ++i) {
        s.grad_y.push_back(grad_y.at(t * step + int64_t{b} * width + first + i));
        if (k == length - 1 && n.grad_h_n) s.grad_y[i] += grad_h_n.at(state + i);
      }
      layer.backward(s, dh, none);
      if (edge(t + d)) dh.assign(n.S, 0);
      for (int i = 0; i < n.S && n.norm; ++i) {
        gains[first + i] += s.dn[i] * s.ahat[i];
        offsets[first + i] += s.dn[i];
      }
      judge_record(group, t, b, s, k == length - 1 || edge(t + 1 - d));
    }
    for (int i = 0; i < n.S; ++i) {
      if (length == 0 && n.grad_h_n) dh[i] = grad_h_n.at(state + i);
      check("dh_0", dh_0.at(state + i), dh[i]);
    }
    for (int t = 0; t < n.T; ++t) {
      for (int i = 0; i < n.S; ++i) {
        const int64_t at = t * step + int64_t{b} * width + first + i;
        check("y", y.at(at), t < length ? steps[t].h[i] : 0);
        check("dp", dp.at(at), t < length ? steps[t].dp[i] : 0);
        if (n.norm) check("ahat", ahat.at(at), t < length ? steps[t].ahat[i] : 0);
      }
      if (t >= length && n.measured) {
        for (int i = 0; i < rnnfast::kFields; ++i) {
          const int64_t at = ((int64_t{d} * n.T + t) * n.B + b) * rnnfast::kFields + i;
          check("the record of no step", measured.at(at), 0);
        }
      }
    }
  }

  void judge_record(int group, int t, int b, const reference::Step& s, bool stops) {
    if (!n.measured || n.heads > 1) return;  // what it adds up over heads the Python tests judge
    const int64_t at = ((int64_t{group} * n.T + t) * n.B + b) * rnnfast::kFields;
    const auto squares = [](const reference::Row& x) {
      double sum = 0;
      for (double v : x) sum += v * v;
      return sum;
    };
    check("state squares", measured.at(at + rnnfast::kStateSquares), squares(s.dh));
    check("carry squares", measured.at(at + rnnfast::kCarrySquares), squares(s.carry));
    check("clipped squares", measured.at(at + rnnfast::kClippedSquares), squares(s.clipped));
    check("preact squares", measured.at(at + rnnfast::kPreactSquares), squares(s.dp));
    double most = 0, slopes = 0;
    for (double x : s.dh) most = std::fmax(most, std::fabs(x));
    for (double x : s.h) slopes += reference_slope(x);
    check("state max", measured.at(at + rnnfast::kStateMax), most);
    check("slopes", measured.at(at + rnnfast::kSlopes), slopes, 3);
    check("not finite", measured.at(at + rnnfast::kNonfiniteGrad), 0);
    check("not finite", measured.at(at + rnnfast::kNonfiniteState), 0);
    check("entries", measured.at(at + rnnfast::kEntries), n.S);
    check("carried", measured.at(at + rnnfast::kCarried), stops ? 0 : n.S);
  }

  double reference_slope(double h) const {
    if (n.f == cuda::Nonlinearity::kRelu) return h > 0;
    return n.f == cuda::Nonlinearity::kTanh ? 1 - h * h : h * (1 - h);
  }
};

int configuration = 0;  // the next

template <class K>
void try_sizes(const char* name, int number) {
  if (wanted >= 0 && wanted != configuration++) return;
  constexpr bool kRounds = !std::is_same_v<typename K::Mode, cuda::Exact>;
  const bool flags[] = {false, true};
  for (int i = 0; i < number && failures == 0; ++i) {
    const auto maybe = [&] { return flags[pick(2)]; };
    const int heads = 1 + static_cast<int>(pick(2));
    const float limit = maybe() ? 0.7f : 0.0f;
    const int S = pick(3) == 0 ? K::kUnits : 1 + static_cast<int>(pick(K::kUnits));
    const Sizes sizes = {
        static_cast<int>(pick(3) == 0 ? 1 : 2 + pick(6)), 1 + static_cast<int>(pick(11)), S,
        1 + static_cast<int>(pick(2)), heads,
        is_streamed<K> || maybe() ? 8 : 1 + static_cast<int>(pick(7)), maybe(), maybe(), maybe(),
        maybe(), maybe(), maybe(), static_cast<int>(pick(4)), limit,
        // Where operands are rounded, some state crosses ReLU's corner.
        static_cast<cuda::Nonlinearity>(kRounds ? 2 * pick(2) : pick(3)), limit > 0 && maybe()};
    emulation::set_seed(engine());
    Test<K> test{.n = sizes, .name = name};
    test.run();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int number = argc > 1 ? std::atoi(argv[1]) : 4;
  if (argc > 2) wanted = std::atoi(argv[2]);
  if (argc == 7) fault = {argv[3], argv[4], std::atoi(argv[5]), argv[6]};
  using BFloat16 = cuda::Half<cuda::BFloat16>;
  try {
    try_sizes<cuda::Kernel<cuda::Exact, 32, 1>>("exact", number);
    try_sizes<cuda::Kernel<BFloat16, 64, 1, 2, 2>>("bfloat16, 2 blocks", number);
    try_sizes<Streamed<cuda::Exact, 1, 2>>("exact, streaming", number / 4);
    try_sizes<Streamed<cuda::Exact, 2, 4>>("exact, streaming, 2 tiles", number / 8);
    try_sizes<Streamed<BFloat16, 4, 8>>("bfloat16, streaming, 4 tiles", number / 8);
    try_sizes<cuda::Kernel<BFloat16, 64, 2>>("bfloat16", number);
    try_sizes<cuda::Kernel<BFloat16, 64, 2, 2, 2>>("bfloat16, 2 blocks, all own", number / 2);
    try_sizes<cuda::Kernel<cuda::Tf32, 48, 1>>("tf32", number);
    try_sizes<cuda::Kernel<cuda::Exact, 32, 1, 2>>("exact, 2 blocks", number / 2);
    try_sizes<cuda::Kernel<cuda::Tf32, 64, 2, 2, 2, 1>>("tf32, 2 blocks", number / 2);
    try_sizes<cuda::Kernel<BFloat16, 64, 1, 4>>("bfloat16, 4 blocks", number / 4);
    try_sizes<cuda::Kernel<BFloat16, 192, 3, 2, 6, 1>>("bfloat16, 6 parts", number / 4);
    try_sizes<cuda::Kernel<cuda::Exact, 128, 1, 8>>("exact, 8 blocks", number / 8);
    try_sizes<cuda::Kernel<BFloat16, 256, 1, 16>>("bfloat16, 16 blocks", number / 8);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  if (failures) std::printf("%d failures\n", failures);
  for (const emulation::Fault& place : emulation::places()) {
    std::printf("place\t%s\t%s\t%d\t%s\n", place.kernel.c_str(), place.file.c_str(), place.line,
                place.change.c_str());
  }
  return failures != 0;
}
