// Question 5: how fast does mma.sync issue when the A fragments (the weights) stay in registers,
// what is its latency, do its fragments and movmatrix lie as the kernels assume, how does it round,
// and how fast does shared memory feed it?
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <random>

#include "probe.cuh"

using ptx::Operand;

const char* name_of(Operand operand) {
  return operand == Operand::kBf16 ? "bf16" : operand == Operand::kFp16 ? "fp16" : "tf32";
}

// --- issue interval and latency ------------------------------------------------------------------

constexpr int kUnroll = 32;     // mma in the loop body
constexpr int kFragments = 16;  // A fragments a warp holds: 64 registers

struct Rate {
  int iterations;
  const uint32_t* values;  // [kFragments * 4 + 2], any small numbers
  long long* cycles;       // [warps][2] begin, end
  float* sink;             // [warps * 32]
};

// kChains independent accumulators: 1 shows the latency, enough of them the issue interval.
template <Operand kOperand, int kChains>
__global__ void __launch_bounds__(512, 1) mma_rate(Rate p) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t a[kFragments][4], b[2];
#pragma unroll
  for (int i = 0; i < kFragments * 4; ++i) a[i / 4][i % 4] = p.values[i];
  b[0] = p.values[kFragments * 4];
  b[1] = p.values[kFragments * 4 + 1];
  float d[kChains][4] = {};
  __syncthreads();
  const long long begin = clock64();
  for (int it = 0; it < p.iterations; ++it) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) ptx::mma<kOperand>(d[i % kChains], a[i % kFragments], b);
  }
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  p.sink[threadIdx.x] = sum;
  const long long end = clock64();
  if (threadIdx.x % 32 == 0) {
    p.cycles[2 * warp] = begin;
    p.cycles[2 * warp + 1] = end;
  }
}

template <Operand kOperand, int kChains>
void measure_rate(int warps) {
  constexpr int kIterations = 512, kRepeats = 5;
  Buffer<uint32_t> values(
      std::vector<uint32_t>(kFragments * 4 + 2, kOperand == Operand::kTf32   ? 0x3a83126f
                                                : kOperand == Operand::kBf16 ? 0x3a833a83
                                                                             : 0x14191419));
  Buffer<long long> cycles(2 * warps);
  Buffer<float> sink(32 * warps);
  std::vector<double> intervals;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    launch(mma_rate<kOperand, kChains>, {.grid = 1, .block = 32 * warps},
           Rate{kIterations, values.get(), cycles.get(), sink.get()});
    finish("mma rate");
    if (repeat == 0) continue;
    const auto c = cycles.host();
    long long begin = c[0], end = c[1];
    for (int w = 0; w < warps; ++w) {
      begin = std::min(begin, c[2 * w]);
      end = std::max(end, c[2 * w + 1]);
    }
    const int warps_each = std::max(1, warps / 4);  // an SM has four sub-partitions
    intervals.push_back(static_cast<double>(end - begin) / kIterations / kUnroll / warps_each);
  }
  Figure("mma_interval")
      .with("operand", name_of(kOperand))
      .with("chains", kChains)
      .with("warps", warps)
      .print(intervals, "cycles");
}

template <Operand kOperand>
void measure_rates() {
  for (const int warps : {1, 4, 8, 16}) {
    measure_rate<kOperand, 1>(warps);
    measure_rate<kOperand, 2>(warps);
    measure_rate<kOperand, 4>(warps);
    measure_rate<kOperand, 8>(warps);
  }
}

// --- one tile, laid out as the PTX manual draws it -----------------------------------------------

constexpr int kM = 16, kN = 8;

struct Tile {
  const float* a;  // [16][K]
  const float* b;  // [K][8]
  const float* c;  // [16][8]
  float* d;        // [16][8]
};

template <Operand kOperand>
__device__ uint32_t operand_word(float low, float high) {
  if constexpr (kOperand == Operand::kTf32) return __float_as_uint(low);
  if constexpr (kOperand == Operand::kBf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <Operand kOperand>
__global__ void multiply_tile(Tile p) {
  constexpr int kPack = kOperand == Operand::kTf32 ? 1 : 2;  // values in a word
  constexpr int kK = 8 * kPack;
  const int group = static_cast<int>(threadIdx.x) / 4, quad = static_cast<int>(threadIdx.x) % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int row = group + i % 2 * 8, k = quad * kPack + i / 2 * 4 * kPack;
    a[i] = operand_word<kOperand>(p.a[row * kK + k], p.a[row * kK + k + kPack - 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int k = quad * kPack + i * 4 * kPack;
    b[i] = operand_word<kOperand>(p.b[k * kN + group], p.b[(k + kPack - 1) * kN + group]);
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = p.c[(group + i / 2 * 8) * kN + quad * 2 + i % 2];
  ptx::mma<kOperand>(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[(group + i / 2 * 8) * kN + quad * 2 + i % 2] = d[i];
}

template <Operand kOperand>
std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b,
                            const std::vector<float>& c) {
  Buffer<float> a_(a), b_(b), c_(c), d_(kM * kN);
  launch(multiply_tile<kOperand>, {.grid = 1, .block = 32},
         Tile{a_.get(), b_.get(), c_.get(), d_.get()});
  finish("one tile");
  return d_.host();
}

template <Operand kOperand>
int check_layout() {
  constexpr int kK = kOperand == Operand::kTf32 ? 8 : 16;
  std::mt19937 random(1);
  const auto integers = [&](int size) {  // small enough for every product and sum to be exact
    std::vector<float> v(size);
    for (float& x : v) x = static_cast<float>(static_cast<int>(random() % 17) - 8);
    return v;
  };
  const auto a = integers(kM * kK), b = integers(kK * kN), c = integers(kM * kN);
  const auto d = multiply<kOperand>(a, b, c);
  int wrong = 0;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      float sum = c[m * kN + n];
      for (int k = 0; k < kK; ++k) sum += a[m * kK + k] * b[k * kN + n];
      wrong += !(d[m * kN + n] == sum);
    }
  Figure("wrong_fragment_values").with("operand", name_of(kOperand)).print(wrong, "values");
  return wrong;
}

// d[0][0] of a tile that is zero but for A[0][0], B[0][0] and C[0][0].
template <Operand kOperand>
float multiply_add(float a, float b, float c) {
  constexpr int kK = kOperand == Operand::kTf32 ? 8 : 16;
  std::vector<float> a_(kM * kK), b_(kK * kN), c_(kM * kN);
  a_[0] = a;
  b_[0] = b;
  c_[0] = c;
  return multiply<kOperand>(a_, b_, c_)[0];
}

void check_rounding() {
  // Three quarters of the way to the next tf32 number: 1 if the unit cuts the low bits off.
  const float step = std::ldexp(1.f, -10), between = 1 + 0.75f * step;
  const float product = multiply_add<Operand::kTf32>(between, 1, 0);
  Figure("tf32_operand")
      .with("rounding", product == 1          ? "truncated"
                        : product == 1 + step ? "to nearest"
                                              : "other")
      .print(product, "for 1 + 0.75 * 2^-10");
  // Three quarters of the way from 1 to the next float32: 1 if the sum is cut off.
  const float ulp = std::ldexp(1.f, -23);
  const float sum = multiply_add<Operand::kBf16>(0.75f, ulp, 1);
  Figure("mma_sum")
      .with("rounding", sum == 1         ? "truncated"
                        : sum == 1 + ulp ? "to nearest"
                                         : "other")
      .print((sum - 1) / ulp, "ulp for 0.75 ulp added to 1");
}

__global__ void transpose_tile(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = ptx::transpose_8x8(in[threadIdx.x]);
}

int check_transpose() {
  std::vector<uint32_t> in(32);
  for (uint32_t i = 0; i < 32; ++i) in[i] = (2 * i + 1) << 16 | 2 * i;  // value = 8 * row + column
  Buffer<uint32_t> in_(in), out_(32);
  launch(transpose_tile, {.grid = 1, .block = 32}, in_.get(), out_.get());
  finish("movmatrix");
  const auto out = out_.host();
  int wrong = 0;
  for (uint32_t row = 0; row < 8; ++row)
    for (uint32_t column = 0; column < 8; ++column)
      wrong += (out[row * 4 + column / 2] >> (column % 2 * 16) & 0xffff) != 8 * column + row;
  Figure("wrong_fragment_values").with("operand", "movmatrix").print(wrong, "values");
  return wrong;
}

// --- shared-memory load bandwidth ----------------------------------------------------------------

constexpr int kLoads = 8;  // in flight, each of its own bytes

// Lane i of a warp takes the i-th word, pair or quad of its row: no bank conflict.
template <int kWords>
__global__ void __launch_bounds__(1024, 1)
    load_loop(int iterations, long long* cycles, uint32_t* sink) {
  DYNAMIC_SHARED(shared);
  constexpr int kBytes = kLoads * 32 * 16;  // all warps read the same 4 KB
  for (int i = static_cast<int>(threadIdx.x) * 4; i < kBytes; i += static_cast<int>(blockDim.x) * 4)
    *reinterpret_cast<int*>(shared + i) = i;
  const uint32_t address = ptx::shared_address(shared) + threadIdx.x % 32 * 4 * kWords;
  __syncthreads();
  const long long begin = clock64();
  uint32_t sum[kWords] = {};
  for (int it = 0; it < iterations; ++it) {
    uint32_t v[kLoads][kWords];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) ptx::load_shared(v[i], address + i * 32 * 4 * kWords);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int w = 0; w < kWords; ++w) sum[w] ^= v[i][w];
  }
  for (int w = 1; w < kWords; ++w) sum[0] ^= sum[w];
  sink[threadIdx.x] = sum[0];
  __syncthreads();
  if (threadIdx.x == 0) *cycles = clock64() - begin;
}

template <int kWords>
void measure_loads(const char* width) {
  constexpr int kIterations = 1000, kRepeats = 5;
  for (const int warps : {4, 8, 16, 32}) {
    Buffer<long long> cycles(1);
    Buffer<uint32_t> sink(32 * warps);
    std::vector<double> rates;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      launch(load_loop<kWords>, {.grid = 1, .block = 32 * warps, .shared = kLoads * 32 * 16},
             kIterations, cycles.get(), sink.get());
      finish("shared-memory loads");
      const double bytes = 128.0 * kWords * kLoads * kIterations * warps;
      if (repeat > 0) rates.push_back(bytes / static_cast<double>(cycles.host()[0]));
    }
    Figure("shared_load").with("width", width).with("warps", warps).print(rates, "B/clk/SM");
  }
}

int main() {
  warm_up();
  const int wrong = check_layout<Operand::kBf16>() + check_layout<Operand::kFp16>() +
                    check_layout<Operand::kTf32>() + check_transpose();
  check_rounding();
  measure_rates<Operand::kBf16>();
  measure_rates<Operand::kFp16>();
  measure_rates<Operand::kTf32>();
  measure_loads<1>("32 bits");
  measure_loads<2>("64 bits");
  measure_loads<4>("128 bits");
  if (wrong) problems.add("%d values of a fragment are not where the layout puts them", wrong);
  return problems.exit_status();
}
