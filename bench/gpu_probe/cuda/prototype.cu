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

// The largest of what is a number; NaN once anything is not.
void raise(double& worst, double value) {
  if (!(value <= worst)) worst = value;
}

template <class K>
Shape shape_of(int clusters) {
  return {.grid = clusters * K::C,
          .block = K::THREADS,
          .cluster = K::C,
          .shared = static_cast<size_t>(K::SMEM)};
}

// One pass over T steps of B = clusters * nb rows (the last cluster may hold fewer).
template <class K>
struct Forward {
  static constexpr const char* kPass = "forward";
  static constexpr auto kKernel = rnn_fwd_cluster<K>;
  const int T, B;
  std::vector<uint16_t> x, w, h0;
  Buffer<uint16_t> x_, w_, h0_, h_;

  Forward(int T, int B)
      : T(T),
        B(B),
        x(normal(static_cast<size_t>(T) * B * K::H, 1)),
        w(normal(static_cast<size_t>(K::H) * K::H, 1 / std::sqrt(static_cast<float>(K::H)))),
        h0(normal(static_cast<size_t>(B) * K::H, 0.5f)),
        x_(x),
        w_(w),
        h0_(h0),
        h_(static_cast<size_t>(T) * B * K::H) {}

  void operator()(int nb, int steps) {
    launch(kKernel, shape_of<K>((B + nb - 1) / nb),
           FwdParams{x_.get(), w_.get(), h0_.get(), h_.get(), steps, B, nb});
  }
  Buffer<uint16_t>& result() { return h_; }

  // One step at a time in float64, from the kernel's own previous value.
  double worst_error() const {
    const auto h = h_.host();
    double worst = 0;
    for (int t = 0; t < T; ++t)
      for (int b = 0; b < B; ++b) {
        const size_t row = (static_cast<size_t>(t) * B + b) * K::H;
        const uint16_t* before =
            t ? &h[row - static_cast<size_t>(B) * K::H] : &h0[static_cast<size_t>(b) * K::H];
        for (int i = 0; i < K::H; ++i) {
          double a = to_float(x[row + i]);
          for (int k = 0; k < K::H; ++k)
            a += static_cast<double>(to_float(w[static_cast<size_t>(i) * K::H + k])) *
                 to_float(before[k]);
          raise(worst, std::fabs(std::tanh(a) - to_float(h[row + i])));
        }
      }
    return worst;
  }
};

template <class K>
struct Backward {
  static constexpr const char* kPass = "backward";
  static constexpr auto kKernel = rnn_bwd_cluster<K>;
  const int T, B;
  std::vector<uint16_t> dy, w, h, dh_n;
  Buffer<uint16_t> dy_, w_, h_, dh_n_, da_;
  Buffer<float> dh_0_, statistics_;

  Backward(int T, int B)
      : T(T),
        B(B),
        dy(normal(static_cast<size_t>(T) * B * K::H, 1)),
        w(normal(static_cast<size_t>(K::H) * K::H, 1 / std::sqrt(static_cast<float>(K::H)))),
        h(normal(static_cast<size_t>(T) * B * K::H, 0.3f)),
        dh_n(normal(static_cast<size_t>(B) * K::H, 1)),
        dy_(dy),
        w_(w),
        h_(h),
        dh_n_(dh_n),
        da_(static_cast<size_t>(T) * B * K::H),
        dh_0_(static_cast<size_t>(B) * K::H),
        statistics_(static_cast<size_t>(T) * B * K::C * K::NWARP * 4) {}

  void operator()(int nb, int steps) {
    launch(kKernel, shape_of<K>((B + nb - 1) / nb),
           BwdParams{dy_.get(), w_.get(), h_.get(), dh_n_.get(), da_.get(), dh_0_.get(),
                     statistics_.get(), steps, B, nb});
  }
  Buffer<uint16_t>& result() { return da_; }

  double worst_error() const {  // relative to 1 + |da|, and to 1 + |dh_0|
    const auto da = da_.host();
    const auto dh_0 = dh_0_.host();
    const size_t step = static_cast<size_t>(B) * K::H;
    double worst = 0;
    std::vector<double> carry(K::H);
    for (int t = T - 1; t >= -1; --t)
      for (int b = 0; b < B; ++b) {
        const size_t row = static_cast<size_t>(b) * K::H;
        std::fill(carry.begin(), carry.end(), 0.0);
        for (int k = 0; t < T - 1 && k < K::H; ++k) {
          const double a = to_float(da[(t + 1) * step + row + k]);
          for (int i = 0; i < K::H; ++i)
            carry[i] += a * to_float(w[static_cast<size_t>(k) * K::H + i]);
        }
        for (int i = 0; i < K::H; ++i) {
          if (t < 0) {
            raise(worst, std::fabs(carry[i] - dh_0[row + i]) / (1 + std::fabs(carry[i])));
            continue;
          }
          const size_t at = t * step + row + i;
          const double out = t == T - 1 ? to_float(dh_n[row + i]) : 0.0;
          const double state = to_float(h[at]);
          const double a = (carry[i] + out + to_float(dy[at])) * (1 - state * state);
          raise(worst, std::fabs(a - to_float(da[at])) / (1 + std::fabs(a)));
        }
      }
    return worst;
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
  {  // right: two clusters, the second one only partly full
    Pass<K> pass(4, kColumns + 3);
    pass(kColumns, 4);
    finish("check");
    const double worst = pass.worst_error();
    if (!(worst <= kBound)) fail("worst error %g, bound %g", worst, kBound);
    tag("prototype_error").print(worst, "largest abs");
  }
  constexpr int kShort = 128, kLong = 512, kRuns = 7;
  // One block an SM, as the product will be; small blocks could share one.
  const int most =
      K::C > 1 ? std::min(max_active_clusters(Pass<K>::kKernel, shape_of<K>(1)), sm_count() / K::C)
               : sm_count();
  if (most < 1) fail("no cluster of %d blocks fits on this device", K::C);
  tag("prototype_clusters").print(most, "clusters");
  for (const bool alone : {true, false}) {
    const int clusters = alone ? 1 : most;
    Pass<K> pass(kLong, clusters * kColumns);
    unsigned long long first = 0;
    std::vector<double> whole, slope;
    for (int run = 0; run < kRuns; ++run) {
      const double few = device_ms([&] { pass(kColumns, kShort); });
      finish("short run");
      pass.result().fill(0xff);
      const double many = device_ms([&] { pass(kColumns, kLong); });
      finish("long run");
      const unsigned long long bits = checksum(pass.result());
      if (run == 0) first = bits;
      if (bits != first) fail("run %d of the same inputs gives other bits", run);
      if (run == 0) continue;  // it loads the code
      whole.push_back(many * 1e3 / kLong);
      slope.push_back((many - few) * 1e3 / (kLong - kShort));
    }
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
      return 0;
    }
  fail("no kernel for H %d, C %d, N %d", H, C, N);
}
