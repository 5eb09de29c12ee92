// The emulation itself: what it computes, and that it finds what it is there to find.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/device/math.cuh"
#include "ring.cuh"

namespace emulation = rnnfast::emulation;
namespace cuda = rnnfast::cuda;
namespace rt = rnnfast::cuda::rt;

namespace {

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

std::vector<std::uint32_t> ring_of(int cluster, int clusters, int steps, std::uint64_t seed) {
  constexpr int kThreads = 32;
  std::vector<std::uint32_t> out(static_cast<size_t>(cluster * clusters * kThreads), ~0u);
  const ring::Arguments arguments = {out.data(), steps, cluster, kThreads};
  emulation::set_seed(seed);
  const auto bytes = static_cast<std::size_t>(ring::bytes(cluster, kThreads));
  emulation::launch({cluster * clusters, 1, kThreads, cluster, bytes},
                    [&] { ring::turn(arguments); });
  return out;
}

std::vector<std::uint32_t> ring_wanted(int cluster, int clusters, int steps) {
  constexpr int kThreads = 32;
  std::vector<std::uint32_t> value;
  for (int i = 0; i < cluster * clusters * kThreads; ++i) {
    value.push_back(static_cast<std::uint32_t>(i));
  }
  const int each = cluster * kThreads;
  for (int t = 0; t < steps; ++t) {
    for (int c = 0; c < clusters; ++c) {
      std::uint32_t sum = 0;
      for (int i = 0; i < each; ++i) sum = sum * 31 + value[c * each + i];
      for (int i = 0; i < each; ++i) value[c * each + i] = sum + static_cast<std::uint32_t>(i);
    }
  }
  return value;
}

void clusters() {
  for (int cluster : {1, 2, 4, 8}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      expect(ring_of(cluster, 2, 5, seed) == ring_wanted(cluster, 2, 5), "a ring of blocks");
    }
  }
}

#ifndef RING_FAULT

template <class Kernel>
void on_a_warp(Kernel kernel) {
  emulation::launch({1, 1, 32, 1, 256}, kernel);
}

// Products of whole numbers, which are exact, by the fragments that PTX describes in words: row and
// column of register i of a lane.
template <class Type>
void fragments_of_16_bits(const char* name) {
  float a[16][16], b[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) a[i][k] = static_cast<float>((i * 7 + k * 3) % 11 - 5);
    for (int n = 0; n < 8; ++n) b[i][n] = static_cast<float>((i * 5 + n * 2) % 13 - 6);
  }
  on_a_warp([&] {
    const int lane = rt::thread(), group = lane >> 2, in_group = lane & 3;
    std::uint32_t of_a[4], of_b[2];
    float d[4] = {1, 1, 1, 1};
    for (int i = 0; i < 4;
         ++i) {  // a: row group (+8 for registers 1, 3), column 2 in_group (+8 for 2, 3)
      const int row = group + (i % 2) * 8, column = in_group * 2 + (i / 2) * 8;
      of_a[i] = rt::pack(Type{}, a[row][column], a[row][column + 1]);
    }
    for (int i = 0; i < 2; ++i) {  // b: row 2 in_group (+8 for register 1), column group
      const int row = in_group * 2 + i * 8;
      of_b[i] = rt::pack(Type{}, b[row][group], b[row + 1][group]);
    }
    rt::multiply(Type{}, d, of_a, of_b);
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i / 2) * 8, column = in_group * 2 + i % 2;
      float wanted = 1;
      for (int k = 0; k < 16; ++k) wanted += a[row][k] * b[k][column];
      if (d[i] != wanted) emulation::fail(std::string("a product of ") + name);
    }
  });
}

void fragments() {
  fragments_of_16_bits<cuda::BFloat16>("bfloat16");
  fragments_of_16_bits<cuda::Float16>("float16");
  on_a_warp([] {
    const int lane = rt::thread(), group = lane >> 2, in_group = lane & 3;
    const auto a = [](int i, int k) { return static_cast<float>(i * 8 + k); };
    const auto b = [](int k, int n) { return static_cast<float>(k * 3 - n); };
    std::uint32_t of_a[4], of_b[2];
    for (int i = 0; i < 4; ++i) {
      of_a[i] = rt::to_tf32(a(group + (i % 2) * 8, in_group + (i / 2) * 4));
    }
    for (int i = 0; i < 2; ++i) of_b[i] = rt::to_tf32(b(in_group + i * 4, group));
    float d[4] = {};
    rt::multiply_tf32(d, of_a, of_b);
    for (int i = 0; i < 4; ++i) {
      float wanted = 0;
      for (int k = 0; k < 8; ++k) wanted += a(group + (i / 2) * 8, k) * b(k, in_group * 2 + i % 2);
      if (d[i] != wanted) emulation::fail("a product of TF32");
    }
  });
  on_a_warp([] {
    const int lane = rt::thread(), row = lane / 4, column = lane % 4 * 2;
    const auto at = [](int r, int c) { return static_cast<std::uint32_t>(r * 8 + c); };
    const std::uint32_t found = rt::transpose(at(row, column) | at(row, column + 1) << 16);
    if (found != (at(column, row) | at(column + 1, row) << 16))
      emulation::fail("a transposed matrix");
    if (rt::shuffle_xor(lane, 5) != (lane ^ 5)) emulation::fail("a shuffle");
    if (!rt::any(lane == 31) || rt::any(lane == 32)) emulation::fail("a vote");
  });
}

void roundings() {
  const auto half = [](float x) { return rt::pack(cuda::Float16{}, x, 0) & 0xffff; };
  expect(half(1.0f) == 0x3c00 && half(-2.0f) == 0xc000, "float16 of whole numbers");
  expect(half(65519.0f) == 0x7bff && half(65520.0f) == 0x7c00, "float16 at its end");
  expect(half(0x1p-24f) == 1 && half(0x1p-25f) == 0 && half(0x1.8p-25f) == 1, "float16 subnormal");
  expect(half(1 + 0x1p-11f) == 0x3c00 && half(1 + 0x3p-11f) == 0x3c02, "float16 to even");
  expect((half(NAN) & 0x7fff) > 0x7c00, "float16 of NaN");
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) {  // every number there and back
    if (half(rt::widen(cuda::Float16{static_cast<std::uint16_t>(bits)})) != bits) {
      return expect(false, "float16 of " + std::to_string(bits));
    }
  }
  const auto bfloat = [](float x) { return rt::pack(cuda::BFloat16{}, x, 0) & 0xffff; };
  expect(bfloat(1 + 0x1p-8f) == 0x3f80 && bfloat(1 + 0x3p-8f) == 0x3f82, "bfloat16 to even");
  expect((bfloat(NAN) & 0x7fff) > 0x7f80, "bfloat16 of NaN");
  expect(rt::float_of(rt::to_tf32(1 + 0x1p-11f)) == 1 + 0x1p-10f, "TF32 rounds away from zero");
}

// The worst error of `found` as a multiple of what PTX allows, over numbers of one sign.
template <class Found, class Exact, class Most>
double worst(double first, double last, Found found, Exact exact, Most most) {
  double worst = 0;
  for (double x = first; x <= last; x *= 1.00037) {
    const float given = static_cast<float>(x);
    const double wanted = exact(given);
    worst = std::max(worst, std::fabs(found(given) - wanted) / most(wanted));
  }
  return worst;
}

// The approximate instructions err as far as they may, and no further.
void approximations() {
  const auto ulps = [](double n) { return [n](double x) { return n * rt::ulp(x); }; };
  const auto part = [](double n) { return [n](double x) { return n * std::fabs(x); }; };
  const auto power = [](float x) { return std::exp2(static_cast<double>(x * 1.44269504f)); };
  const auto near = [](double ratio) { return ratio > 0.9 && ratio <= 1; };
  expect(near(worst(1e-3, 80, rt::exp, power, ulps(2))), "exp errs by 2 ulp");
  expect(rt::exp(0) == 1 && rt::exp(-90) == 0 && rt::exp(100) == HUGE_VALF, "exp at its ends");
  const auto inverse = [](float x) { return 1 / static_cast<double>(x); };
  expect(near(worst(1e-30, 1e30, rt::reciprocal, inverse, ulps(1))), "1 / x errs by 1 ulp");
  expect(rt::reciprocal(HUGE_VALF) == 0 && rt::reciprocal(0) == HUGE_VALF, "1 / x at its ends");
  expect(rt::reciprocal(0x1p127f) == 0, "1 / x puts out no subnormal number");
  const auto root = [](float x) { return 1 / std::sqrt(static_cast<double>(x)); };
  const double allowed = std::exp2(-22.9);
  expect(near(worst(1e-30, 1e30, rt::inverse_root, root, part(allowed))), "1 / root errs");
  const auto tanh = [](float x) { return std::tanh(static_cast<double>(x)); };
  expect(near(worst(1e-6, 20, rt::rough_tanh, tanh, part(0x1p-11))), "tanh.approx errs by 2^-11");
}

// tanh and sigmoid of float32, made of these, keep the budget of a step of one unit: two roundings
// of the result, four of the argument (rnnfast/testing.py). And far from zero on the left, where
// sigmoid is small, a relative one.
void activations() {
  const auto check = [](const char* name, cuda::Nonlinearity f, auto exact) {
    for (double x = 1e-6; x < 80; x *= 1.0007) {
      for (double sign : {-1.0, 1.0}) {
        const float given = static_cast<float>(sign * x);
        float values[1][4] = {{given, given, given, given}};
        cuda::activate<float>(f, values);
        const double wanted = exact(static_cast<double>(given));
        const double error = std::fabs(values[0][3] - wanted);
        const double argument = std::fabs(given) * 0x1p-24;
        const bool good = error <= 2 * 0x1p-24 * std::fabs(wanted) + 4 * argument &&
                          error <= (8 * 0x1p-24 + 2 * argument) * std::fabs(wanted);
        if (!good) return expect(false, std::string(name) + " of " + std::to_string(given));
      }
    }
    for (float x : {NAN, HUGE_VALF, -HUGE_VALF, 0.0f}) {
      float values[1][4] = {{x, x, x, x}};
      cuda::activate<float>(f, values);
      const double wanted = exact(static_cast<double>(x));
      const bool good = std::isnan(wanted) ? std::isnan(values[0][0]) : values[0][0] == wanted;
      expect(good, std::string(name) + " of " + std::to_string(x));
    }
  };
  check("tanh", cuda::Nonlinearity::kTanh, [](double x) { return std::tanh(x); });
  check("sigmoid", cuda::Nonlinearity::kSigmoid, [](double x) { return 1 / (1 + std::exp(-x)); });
}

#ifndef RNNFAST_EMULATION_THREADS  // which would end the process

// Messages of the emulation about a wrong kernel.
template <class Kernel>
void finds(const std::string& words, const emulation::Launch& launch, Kernel kernel) {
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    emulation::set_seed(seed);
    try {
      emulation::launch(launch, kernel);
      expect(false, "nothing was found, wanted: " + words);
    } catch (const std::runtime_error& error) {
      expect(std::string(error.what()).find(words) != std::string::npos,
             std::string("found: ") + error.what() + ", wanted: " + words);
    }
  }
}

void faults() {
  finds("deadlock: a thread waits for the threads of its block", {1, 1, 64, 1, 0}, [] {
    if (rt::thread() < 32) rt::sync_block();
  });
  finds("the lanes of a warp have parted", {1, 1, 32, 1, 0}, [] {
    if (rt::thread() < 16) {
      rt::any(true);
    } else {
      rt::transpose(0);
    }
  });
  finds("beyond the shared memory of its block", {1, 1, 32, 1, 64}, [] {
    if (rt::thread() == 0) rt::shared()[64] = 0;
  });
  finds("an address beyond the shared memory", {2, 1, 32, 2, 64}, [] {
    rt::sync_cluster();
    const std::uint32_t to = rt::in_block(rt::address_of(rt::shared() + 64), 1);
    if (rt::thread() == 0 && rt::cluster_rank() == 0) rt::send(to, {0u}, to);
    rt::sync_cluster();
    for (int i = 0; i < 50; ++i) rt::sync_cluster();
  });
  finds("a block that has ended", {2, 1, 32, 2, 64}, [] {
    if (rt::cluster_rank() == 1) return;
    for (int i = 0; i < 50; ++i) rt::sync_block();
    const std::uint32_t to = rt::in_block(rt::address_of(rt::shared()), 1);
    if (rt::thread() == 0) rt::send(to, {0u}, to + 8);
    for (int i = 0; i < 50; ++i) rt::sync_block();
  });
  finds("more arrivals at an mbarrier", {1, 1, 32, 1, 64}, [] {
    auto* barrier = reinterpret_cast<std::uint64_t*>(rt::shared());
    if (rt::thread() != 0) return;
    rt::mbarrier_init(barrier, 1);
    rt::mbarrier_expect(barrier, 4);
    rt::mbarrier_expect(barrier, 4);
  });
  finds("deadlock: a thread waits for an mbarrier", {1, 1, 32, 1, 64}, [] {
    auto* barrier = reinterpret_cast<std::uint64_t*>(rt::shared());
    if (rt::thread() == 0) rt::mbarrier_init(barrier, 1);
    rt::sync_block();
    rt::mbarrier_wait(barrier, 0);
  });
  on_a_warp([] {  // shared memory starts as NaN
    float first;
    std::memcpy(&first, rt::shared(), 4);
    if (!std::isnan(first)) emulation::fail("shared memory that somebody has cleared");
  });
}

#endif

#endif

}  // namespace

int main() {
  try {
    clusters();
#ifndef RING_FAULT
    fragments();
    roundings();
    approximations();
    activations();
#ifndef RNNFAST_EMULATION_THREADS
    faults();
#endif
#endif
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures != 0;
}
