// The time loops against a naive double loop, without Python, for the sanitizers. From tests/cpp:
//
//   S="kernel_test.cpp ../../csrc/cpu/parallel.cpp -std=c++20 -O1 -g -pthread -ffp-contract=fast"
//   g++ $S -fsanitize=address,undefined -fno-sanitize-recover=all -o /tmp/t && /tmp/t
//   g++ $S -fsanitize=thread -o /tmp/t && /tmp/t
//
// and the same with -DRNNFAST_SIMD_AVX2 -mavx2 -mfma -mf16c, or
// -DRNNFAST_SIMD_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#include <initializer_list>

#include "kernel_case.h"

namespace {

Options draw(int64_t size) {
  Options options;
  options.lengths = pick(2) == 0;
  options.batch_major = pick(3) == 0;
  options.reset = pick(2) == 0;
  options.window = pick(2) == 0 ? 1 + pick(4) : 0;
  options.threads = pick(4) == 0 ? 5 : 3;
  options.cells = pick(2) == 0;
  if (pick(2) == 0) return options;
  // Some rows of dh are longer, some shorter.
  if (pick(2) == 0) options.clip = 0.6 * std::sqrt(static_cast<double>(size));
  options.norm = pick(3) > 0;
  options.beta = options.norm && pick(2) == 0;
  options.recurrent = options.norm && pick(2) == 0;
  options.record = pick(3) > 0;
  options.per_sample = options.record && pick(2) == 0;
  return options;
}

template <class S>
void check_kind(Kind kind, std::initializer_list<int64_t> sizes) {
  for (int64_t size : sizes)
    for (int64_t batch : {1, 3, 7, 13, 21})
      for (int64_t steps : {1, 2, 9}) {
        if (batch * size > 1000) continue;
        const cpu::Shape shape = {steps, batch, size, 1 + pick(2), pick(3) == 0 ? 3 : 1};
        Test<S>{kind, shape, draw(size)}.check();
      }
}

// More points than one chunk of the weight gradient holds, and several of its tiles.
void check_long() {
  Options options;
  options.lengths = options.reset = true;
  Test<float>{Kind::kTanh, {70, 9, 33, 1, 1}, options}.check();
  options.lengths = options.reset = false;
  options.batch_major = true;
  Test<double>{Kind::kGru, {150, 5, 17, 2, 1}, options}.check();
}

// A NaN or inf of p, and one of grad_y, is seen where it is and goes where it must.
void check_nonfinite() {
  for (Kind kind : {Kind::kTanh, Kind::kRelu, Kind::kSigmoid, Kind::kLstm, Kind::kGru})
    for (int i = 0; i < 20; ++i) {
      Options options = draw(5);
      options.recurrent = false;
      options.record = options.nonfinite = true;
      options.per_sample = pick(2) == 0;
      options.threads = 1 + static_cast<int>(pick(5));
      const cpu::Shape shape = {6, 1 + pick(4), 5, 2, 1};
      Test<double>{kind, shape, options}.check();
      if (kind != Kind::kRelu && kind != Kind::kSigmoid) Test<float>{kind, shape, options}.check();
    }
}

// A gate of 0.999 in 16 bits, where it would be stored as 1: after 300 steps 0.74 of a state, and
// of its gradient, is left. Nothing but the gate, as it is stored, and the last rounding of a
// result may be wrong.
template <class S>
void check_memory() {
  constexpr int64_t kSteps = 300;
  const double half_ulp = kHalf<S> ? 0x1p-11 : 0x1p-8;
  for (Kind kind : {Kind::kLstm, Kind::kGru}) {
    Options options;
    options.lengths = true;
    Test<S> test{kind, {kSteps, 3, 17, 2, 1}, options};
    const int64_t lengths[] = {kSteps, 1, 150};
    for (int i = 0; i < 3; ++i) test.lengths.data[i] = lengths[i];
    const bool lstm = kind == Kind::kLstm;
    for (Buffer<S>* data : {&test.w, &test.b, &test.p, &test.grad_y})
      for (int64_t i = 0; i < data->size; ++i) data->data[i] = stored<S>(0);
    // The LSTM adds nothing to c, and puts out nothing; the GRU's candidate is 0.
    const S open = stored<S>(6.9);
    for (int64_t i = 0; i < test.p.size; ++i) {
      const int64_t gate = i / test.shape.size % test.gates;
      if (gate == 1) test.p.data[i] = open;
      if (lstm && (gate == 0 || gate == 3)) test.p.data[i] = stored<S>(-40);
    }
    test.launch(2);
    Buffer<S>&left = lstm ? test.c_n : test.h_n, &first = lstm ? test.c_0 : test.h_0;
    Buffer<S>&back = lstm ? test.dc_0 : test.dh_0, &given = lstm ? test.grad_c_n : test.grad_h_n;
    for (int64_t i = 0; i < left.size; ++i) {
      const int64_t row = i / test.shape.size % test.shape.batch;
      // Each step rounds c, or h - n and its product, in float.
      const double times = std::pow(reference::sigmoid(value(open)), lengths[row]);
      const double share = half_ulp + static_cast<double>(lengths[row]) * 4 * 0x1p-23;
      const double state = times * first.at(i), gradient = times * given.at(i);
      if (!test.near(left.at(i), state, share * std::fabs(state)))
        test.fail("state after a long time", 0, 0, row, i, left.at(i), state);
      if (!test.near(back.at(i), gradient, share * std::fabs(gradient)))
        test.fail("gradient after a long time", 0, 0, row, i, back.at(i), gradient);
    }
  }
}

// The gradients against differences of sum(y grad_y) + sum(h_n grad_h_n) + sum(c_n grad_c_n).
void check_differences(Kind kind) {
  for (int variant = 0; variant < 3; ++variant) {
    Options options;
    options.lengths = options.reset = true;
    options.norm = options.beta = variant > 0;
    options.recurrent = variant == 2;
    options.cells = variant < 2;
    Test<double> test{kind, {4, 3, 5, 2, 1}, options};
    test.check();  // sets lengths, resets and leaks, too
    const auto loss = [&] {
      test.launch(1);
      double sum = 0;
      for (int64_t t = 0; t < 4; ++t)
        for (int64_t b = 0; b < 3; ++b)
          for (int64_t i = 0; i < test.units; ++i) {
            const int64_t place = t * test.stride_t(1) + b * test.stride_b(1) + i;
            if (t < test.length(b)) sum += test.y.at(place) * test.grad_y.at(place);
          }
      for (int64_t i = 0; i < test.h_n.size; ++i) sum += test.h_n.at(i) * test.grad_h_n.at(i);
      for (int64_t i = 0; kind == Kind::kLstm && i < test.c_n.size; ++i)
        sum += test.c_n.at(i) * test.grad_c_n.at(i);
      // 0 in padding, where y may be anything
      for (int64_t i = 0; i < test.cells.size; ++i) sum += test.cells.at(i) * test.grad_cells.at(i);
      return sum;
    };
    const auto compare = [&](const char* what, Buffer<double>& input, Buffer<double>& gradient) {
      test.launch(1);
      const reference::Row found(gradient.get(), gradient.get() + gradient.size);
      for (int64_t i = 0; i < gradient.size; ++i) {
        constexpr double kStep = 1e-5;
        const double before = input.data[i];
        input.data[i] = before + kStep;
        const double above = loss();
        input.data[i] = before - kStep;
        const double wanted = (above - loss()) / (2 * kStep);
        input.data[i] = before;
        if (!test.near(found[i], wanted, 1e-7 * (1 + std::fabs(wanted))))
          test.fail(what, 0, 0, 0, i, found[i], wanted);
      }
    };
    compare("difference of p", test.p, test.dp);
    compare("difference of w", test.w, test.dw);
    compare("difference of h_0", test.h_0, test.dh_0);
    if (kind == Kind::kLstm) compare("difference of c_0", test.c_0, test.dc_0);
    if (kind == Kind::kLeaky) compare("difference of leak", test.leak, test.dleak);
    if (options.norm) compare("difference of gamma", test.gamma, test.dgamma);
    if (options.norm) compare("difference of beta", test.beta, test.dbeta);
  }
}

}  // namespace

int main() {
  cpu::set_cores(5);  // wherever it runs
  for (Kind kind :
       {Kind::kTanh, Kind::kRelu, Kind::kSigmoid, Kind::kLstm, Kind::kGru, Kind::kLeaky}) {
    check_kind<double>(kind, {1, 3, 17, 33, 65});
  }
  for (Kind kind : {Kind::kTanh, Kind::kLstm, Kind::kGru, Kind::kLeaky})
    check_kind<float>(kind, {1, 17, 33});
  for (Kind kind : {Kind::kTanh, Kind::kLstm, Kind::kGru})
    check_kind<level::BFloat16>(kind, {3, 33});
  for (Kind kind : {Kind::kLstm, Kind::kGru}) check_kind<level::Float16>(kind, {17});
  check_memory<level::BFloat16>();
  check_memory<level::Float16>();
  check_nonfinite();
  check_long();
  for (Kind kind : {Kind::kLstm, Kind::kGru, Kind::kLeaky}) check_differences(kind);
  std::printf(failures ? "%d failures\n" : "all kernels agree with the naive loop\n", failures);
  return failures != 0;
}
