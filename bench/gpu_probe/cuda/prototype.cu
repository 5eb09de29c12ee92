// Question 8: the two sketched recurrent kernels, on the chip: are they right, do two runs give the
// same bits, and how long is a time step? Bfloat16, tanh; see prototype/ for the kernels.
#include <random>

#include "probe.cuh"
#include "prototype/rnn_bwd_cluster.cuh"

float to_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

uint16_t to_bf16(float f) {  // to nearest, even; of finite numbers
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Normal numbers; those of a large tensor repeat, with a period that fits no size here.
std::vector<uint16_t> normal(size_t size, float scale) {
  static std::mt19937 random(1);
  constexpr size_t kPeriod = 999'983;
  std::normal_distribution<float> distribution(0, scale);
  std::vector<uint16_t> v(size);
  for (size_t i = 0; i < size; ++i)
    v[i] = i < kPeriod ? to_bf16(distribution(random)) : v[i - kPeriod];
  return v;
}

// A sum over integers, so the same in any order; each value is weighted by its place.
__global__ void add_checksum(const uint16_t* data, size_t size, unsigned long long* sum) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  unsigned long long mine = 0;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride)
    mine += data[i] * (i * 0x9e3779b97f4a7c15ull | 1);
  atomicAdd(sum, mine);
}

unsigned long long checksum(Buffer<uint16_t>& data) {
  Buffer<unsigned long long> sum(1);
  sum.fill(0);
  launch(add_checksum, {.grid = 4 * sm_count(), .block = 256}, data.get(), data.size(), sum.get());
  finish("checksum");
  return sum.host()[0];
}

// Rounding to bfloat16 moves a number in [0.5, 1) by 2^-9 at most, and any da by less than 2^-8 of
// 1 + |da|; tanh.approx adds about 2^-11.
constexpr double kBound = 1.0 / 256;

// The larger one, where a value that is not a number counts as enormous.
double worse(double worst, double value) {
  return std::max(worst, std::isfinite(value) ? value : 1e30);
}

// The kernels' own shared memory or more: one block an SM, as the product will be.
template <class K>
Shape shape_of(int clusters) {
  return {.grid = clusters * K::C,
          .block = K::THREADS,
          .cluster = K::C > 1 ? K::C : 0,
          .shared = std::max<size_t>(K::SMEM, kWholeSm)};
}

// The inputs of both passes: T steps of B rows.
template <class K>
struct Problem {
  static constexpr size_t kH = K::H;
  const int T, B;
  std::vector<uint16_t> w = normal(kH * kH, 1 / std::sqrt(static_cast<float>(kH)));
  Buffer<uint16_t> w_{w};
  size_t rows() const { return static_cast<size_t>(T) * B; }
  size_t at(int t, int b) const { return (static_cast<size_t>(t) * B + b) * kH; }
  double weight(size_t row, size_t column) const { return to_float(w[row * kH + column]); }
};

template <class K>
struct Forward : Problem<K> {
  using Problem<K>::kH, Problem<K>::rows, Problem<K>::at, Problem<K>::weight;
  static constexpr const char* kPass = "forward";
  static constexpr auto kKernel = rnn_fwd_cluster<K>;
  std::vector<uint16_t> x, h_0;
  Buffer<uint16_t> x_, h_0_, h_;

  Forward(int T, int B)
      : Problem<K>{T, B},
        x(normal(rows() * kH, 1)),
        h_0(normal(B * kH, 0.5f)),
        x_(x),
        h_0_(h_0),
        h_(rows() * kH) {}

  void operator()(int nb, int steps) {
    launch(kKernel, shape_of<K>((this->B + nb - 1) / nb),
           FwdParams{x_.get(), this->w_.get(), h_0_.get(), h_.get(), steps, this->B, nb});
  }
  Buffer<uint16_t>& result() { return h_; }

  // One row of one step in float64, from the kernel's own previous value.
  double error(int t, int b) const {
    const auto h = h_.host(at(t, b), kH);
    const auto before =
        t ? h_.host(at(t - 1, b), kH) : std::vector<uint16_t>(&h_0[b * kH], &h_0[b * kH] + kH);
    double worst = 0;
    for (size_t i = 0; i < kH; ++i) {
      double a = to_float(x[at(t, b) + i]);
      for (size_t k = 0; k < kH; ++k) a += weight(i, k) * to_float(before[k]);
      worst = worse(worst, std::fabs(std::tanh(a) - to_float(h[i])));
    }
    return worst;
  }
};

template <class K>
struct Backward : Problem<K> {
  using Problem<K>::kH, Problem<K>::rows, Problem<K>::at, Problem<K>::weight;
  static constexpr const char* kPass = "backward";
  static constexpr auto kKernel = rnn_bwd_cluster<K>;
  std::vector<uint16_t> dy, h, dh_n;
  Buffer<uint16_t> dy_, h_, dh_n_, da_;
  Buffer<float> dh_0_, statistics_;

  Backward(int T, int B)
      : Problem<K>{T, B},
        dy(normal(rows() * kH, 1)),
        h(normal(rows() * kH, 0.3f)),
        dh_n(normal(B * kH, 1)),
        dy_(dy),
        h_(h),
        dh_n_(dh_n),
        da_(rows() * kH),
        dh_0_(B * kH),
        statistics_(rows() * K::C * K::NWARP * 4) {}

  void operator()(int nb, int steps) {
    launch(kKernel, shape_of<K>((this->B + nb - 1) / nb),
           BwdParams{dy_.get(), this->w_.get(), h_.get(), dh_n_.get(), da_.get(), dh_0_.get(),
                     statistics_.get(), steps, this->B, nb});
  }
  Buffer<uint16_t>& result() { return da_; }

  // Relative to 1 + |da|; the row of step 0 with its dh_0, relative to 1 + |dh_0|.
  double error(int t, int b) const {
    const auto da = da_.host(at(t, b), kH);
    const bool last = t == this->T - 1;
    const auto carry = last ? std::vector<double>(kH) : carried(da_.host(at(t + 1, b), kH));
    double worst = 0;
    for (size_t i = 0; i < kH; ++i) {
      const double dh =
          carry[i] + to_float(dy[at(t, b) + i]) + (last ? to_float(dh_n[b * kH + i]) : 0.f);
      const double state = to_float(h[at(t, b) + i]), a = dh * (1 - state * state);
      worst = worse(worst, std::fabs(a - to_float(da[i])) / (1 + std::fabs(a)));
    }
    if (t > 0) return worst;
    const auto wanted = carried(da);
    const auto dh_0 = dh_0_.host(b * kH, kH);
    for (size_t i = 0; i < kH; ++i)
      worst = worse(worst, std::fabs(wanted[i] - dh_0[i]) / (1 + std::fabs(wanted[i])));
    return worst;
  }

 private:
  std::vector<double> carried(const std::vector<uint16_t>& da) const {
    std::vector<double> carry(kH);
    for (size_t k = 0; k < kH; ++k)
      for (size_t i = 0; i < kH; ++i) carry[i] += to_float(da[k]) * weight(k, i);
    return carry;
  }
};

template <template <class> class Pass, class K, int kColumns>
void measure() {
  const auto tag = [](const char* name) {
    return Figure(name)
        .with("pass", Pass<K>::kPass)
        .with("H", K::H)
        .with("C", K::C)
        .with("N", kColumns);
  };
  const auto print_error = [&](const char* of, double worst) {
    tag("prototype_error").with("of", of).print(worst, "largest abs");
    if (!(worst <= kBound)) problems.add("error %g of %s, bound %g", worst, of, kBound);
  };
  {  // two clusters, the second one only partly full
    Pass<K> pass(4, kColumns + 3);
    pass(kColumns, pass.T);
    finish("check");
    double worst = 0;
    for (int t = 0; t < pass.T; ++t)
      for (int b = 0; b < pass.B; ++b) worst = worse(worst, pass.error(t, b));
    print_error("every row, 4 steps", worst);
  }
  constexpr int kShort = 128, kLong = 512, kRuns = 7;
  const int most = K::C > 1 ? max_active_clusters(Pass<K>::kKernel, shape_of<K>(1)) : sm_count();
  if (most < 1) fail("no cluster of %d blocks fits on this device", K::C);
  tag("prototype_clusters").print(most, "clusters");
  for (const bool alone : {true, false}) {
    Pass<K> pass(kLong, (alone ? 1 : most) * kColumns);
    unsigned long long first = 0;
    std::vector<double> whole, slope;
    launch(spin_cycles, {.grid = sm_count(), .block = 32}, 50'000'000);  // clocks up
    for (int run = 0; run < kRuns; ++run) {
      const double few = device_ms([&] { pass(kColumns, kShort); });
      finish("short run");
      pass.result().fill(0xff);
      const double many = device_ms([&] { pass(kColumns, kLong); });
      finish("long run");
      const unsigned long long bits = checksum(pass.result());
      if (run == 0) first = bits;
      if (bits != first) problems.add("run %d of the same inputs gives other bits", run);
      if (run == 0) continue;  // it loads the code
      whole.push_back(many * 1e3 / kLong);
      slope.push_back((many - few) * 1e3 / (kLong - kShort));
    }
    double worst = 0;  // of rows spread over the steps and the batch
    for (int i = 0; i < 64; ++i) worst = worse(worst, pass.error(i * 8, (i * 37 + 5) % pass.B));
    print_error(alone ? "64 rows, one cluster" : "64 rows, all clusters", worst);
    if (!(worst <= kBound)) continue;  // no time of a wrong result
    tag("prototype_step").with("clusters", alone ? "one" : "all").print(slope, "us");
    tag("prototype_step_with_launch").with("clusters", alone ? "one" : "all").print(whole, "us");
  }
}

template <int H, int C, int kWarps, int kTiles = 1>
void measure_either(bool forward) {
  if (forward) return measure<Forward, Cfg<H, C, kTiles, kWarps>, 8 * kTiles>();
  return measure<Backward, Cfg<H, C, kTiles, kWarps>, 8 * kTiles>();
}

struct Configuration {
  int H, C, N;
  void (*measure)(bool forward);
};

constexpr Configuration kConfigurations[] = {
    {64, 1, 8, measure_either<64, 1, 2>},       {128, 1, 8, measure_either<128, 1, 4>},
    {256, 1, 8, measure_either<256, 1, 8>},     {256, 2, 8, measure_either<256, 2, 8>},
    {512, 4, 8, measure_either<512, 4, 8>},     {512, 8, 8, measure_either<512, 8, 8>},
    {512, 8, 16, measure_either<512, 8, 8, 2>}, {512, 16, 8, measure_either<512, 16, 8>},
    {768, 8, 8, measure_either<768, 8, 12>},    {768, 12, 8, measure_either<768, 12, 8>},
    {1024, 16, 8, measure_either<1024, 16, 8>}, {1024, 16, 16, measure_either<1024, 16, 8, 2>},
};

int main(int argc, char** argv) {
  const std::string pass = argc > 1 ? argv[1] : "nothing";
  if (pass != "forward" && pass != "backward")
    fail("argument pass: given %s, wanted forward or backward", pass.c_str());
  const int H = argument(argc, argv, 2, "H", {64, 128, 256, 512, 768, 1024});
  const int C = argument(argc, argv, 3, "C", {1, 2, 4, 8, 12, 16});
  const int N = argument(argc, argv, 4, "N", {8, 16});
  for (const Configuration& c : kConfigurations)
    if (c.H == H && c.C == C && c.N == N) {
      warm_up();
      c.measure(pass == "forward");
      return problems.exit_status();
    }
  fail("no kernel for H %d, C %d, N %d", H, C, N);
}
