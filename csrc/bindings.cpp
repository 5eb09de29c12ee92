// rnnfast._C: addresses and sizes in, nothing checked but names. Shapes, dtypes and devices were
// checked by the caller (rnnfast/backends/cpu.py), which also owns all memory.
#include "cuda/host/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace py = pybind11;
namespace cpu = rnnfast::cpu;

namespace {

using std::int64_t;
using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Nonlinearity nonlinearity_named(const std::string& name) {
  if (name == "tanh") return cpu::Nonlinearity::kTanh;
  if (name == "relu") return cpu::Nonlinearity::kRelu;
  if (name == "sigmoid") return cpu::Nonlinearity::kSigmoid;
  throw std::invalid_argument("unknown nonlinearity '" + name + "'; known: tanh, relu, sigmoid");
}

cpu::Dtype dtype_named(const std::string& name) {
  if (name == "float32") return cpu::Dtype::kFloat32;
  if (name == "float64") return cpu::Dtype::kFloat64;
  if (name == "bfloat16") return cpu::Dtype::kBFloat16;
  if (name == "float16") return cpu::Dtype::kFloat16;
  throw std::invalid_argument("unknown dtype '" + name +
                              "'; known: float32, float64, bfloat16, float16");
}

// x with w_ih and biases, or else p.
void rnn_forward(const std::string& nonlinearity, const std::string& dtype, Address p, Address x,
                 Address w_ih, Address b_ih, Address b_hh, Address w_hh, Address gamma,
                 Address beta, Address h0, Address lengths, Address reset, Address y, Address h_n,
                 Address ahat, Address rstd, int64_t steps, int64_t batch, int64_t size,
                 int64_t directions, int64_t heads, int64_t input_size, int64_t in_stride_t,
                 int64_t in_stride_b, int64_t y_stride_t, int64_t y_stride_b, double norm_eps,
                 int threads) {
  cpu::ForwardProblem problem;
  problem.shape = {steps, batch, size, directions, heads};
  problem.threads = threads;
  problem.lengths = pointer<const int64_t>(lengths);
  problem.reset = pointer<const std::uint8_t>(reset);
  problem.p = {pointer(p), in_stride_t, in_stride_b};
  problem.x = {pointer(x), in_stride_t, in_stride_b};
  problem.input_size = input_size;
  problem.w_ih = pointer(w_ih);
  problem.b_ih = pointer(b_ih);
  problem.w_hh = pointer(w_hh);
  problem.b_hh = pointer(b_hh);
  problem.h0 = pointer(h0);
  problem.gamma = pointer(gamma);
  problem.beta = pointer(beta);
  problem.norm_eps = norm_eps;
  problem.y = {pointer(y), y_stride_t, y_stride_b};
  problem.ahat = {pointer(ahat), y_stride_t, y_stride_b};
  problem.rstd = pointer(rstd);
  problem.h_n = pointer(h_n);
  cpu::kernels().elman_forward(nonlinearity_named(nonlinearity), dtype_named(dtype), problem);
}

void rnn_backward(const std::string& nonlinearity, const std::string& dtype, Address grad_y,
                  Address grad_h_n, Address y, Address ahat, Address x, Address w_ih, Address w_hh,
                  Address gamma, Address beta, Address rstd, Address h0, Address lengths,
                  Address reset, Address dp, Address dx, Address dw_ih, Address db_ih,
                  Address db_hh, Address dw_hh, Address dgamma, Address dbeta, Address dh0,
                  Address record, bool per_sample, int64_t steps, int64_t batch, int64_t size,
                  int64_t directions, int64_t heads, int64_t input_size, int64_t gy_stride_t,
                  int64_t gy_stride_b, int64_t y_stride_t, int64_t y_stride_b,
                  int64_t ahat_stride_t, int64_t ahat_stride_b, int64_t dp_stride_t,
                  int64_t dp_stride_b, int64_t x_stride_t, int64_t x_stride_b, int64_t dx_stride_t,
                  int64_t dx_stride_b, int64_t window, double clip, int threads) {
  cpu::BackwardProblem problem;
  problem.shape = {steps, batch, size, directions, heads};
  problem.threads = threads;
  problem.lengths = pointer<const int64_t>(lengths);
  problem.reset = pointer<const std::uint8_t>(reset);
  problem.window = window;
  problem.clip = clip;
  problem.grad_y = {pointer(grad_y), gy_stride_t, gy_stride_b};
  problem.grad_h_n = pointer(grad_h_n);
  problem.y = {pointer(y), y_stride_t, y_stride_b};
  problem.x = {pointer(x), x_stride_t, x_stride_b};
  problem.input_size = input_size;
  problem.w_ih = pointer(w_ih);
  problem.w_hh = pointer(w_hh);
  problem.h0 = pointer(h0);
  problem.gamma = pointer(gamma);
  problem.beta = pointer(beta);
  problem.ahat = {pointer(ahat), ahat_stride_t, ahat_stride_b};
  problem.rstd = pointer(rstd);
  problem.dp = {pointer(dp), dp_stride_t, dp_stride_b};
  problem.dx = {pointer(dx), dx_stride_t, dx_stride_b};
  problem.dw_ih = pointer(dw_ih);
  problem.db_ih = pointer(db_ih);
  problem.db_hh = pointer(db_hh);
  problem.dw_hh = pointer(dw_hh);
  problem.dgamma = pointer(dgamma);
  problem.dbeta = pointer(dbeta);
  problem.dh0 = pointer(dh0);
  problem.record = pointer<double>(record);
  problem.per_sample = per_sample;
  cpu::kernels().elman_backward(nonlinearity_named(nonlinearity), dtype_named(dtype), problem);
}

// (tasks, parts of each, threads): how a call would be cut up.
std::tuple<int64_t, int64_t, int> rnn_plan(const std::string& dtype, int64_t steps, int64_t batch,
                                           int64_t size, int64_t directions, int64_t heads,
                                           int threads) {
  const cpu::Shape shape = {steps, batch, size, directions, heads};
  const cpu::Plan plan = cpu::kernels().elman_plan(dtype_named(dtype), shape, threads);
  return {plan.tasks(), plan.parts, plan.threads};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of rnnfast: raw addresses (0 = absent), sizes in elements.";
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("rnn_forward", &rnn_forward, no_gil, py::arg("nonlinearity"), py::arg("dtype"),
             py::arg("p"), py::arg("x"), py::arg("w_ih"), py::arg("b_ih"), py::arg("b_hh"),
             py::arg("w_hh"), py::arg("gamma"), py::arg("beta"), py::arg("h0"), py::arg("lengths"),
             py::arg("reset"), py::arg("y"), py::arg("h_n"), py::arg("ahat"), py::arg("rstd"),
             py::arg("T"), py::arg("B"), py::arg("S"), py::arg("directions"), py::arg("heads"),
             py::arg("I"), py::arg("in_stride_t"), py::arg("in_stride_b"), py::arg("y_stride_t"),
             py::arg("y_stride_b"), py::arg("norm_eps"), py::arg("threads"));
  module.def("rnn_backward", &rnn_backward, no_gil, py::arg("nonlinearity"), py::arg("dtype"),
             py::arg("grad_y"), py::arg("grad_h_n"), py::arg("y"), py::arg("ahat"), py::arg("x"),
             py::arg("w_ih"), py::arg("w_hh"), py::arg("gamma"), py::arg("beta"), py::arg("rstd"),
             py::arg("h0"), py::arg("lengths"), py::arg("reset"), py::arg("dp"), py::arg("dx"),
             py::arg("dw_ih"), py::arg("db_ih"), py::arg("db_hh"), py::arg("dw_hh"),
             py::arg("dgamma"), py::arg("dbeta"), py::arg("dh0"), py::arg("record"),
             py::arg("per_sample"), py::arg("T"), py::arg("B"), py::arg("S"), py::arg("directions"),
             py::arg("heads"), py::arg("I"), py::arg("gy_stride_t"), py::arg("gy_stride_b"),
             py::arg("y_stride_t"), py::arg("y_stride_b"), py::arg("ahat_stride_t"),
             py::arg("ahat_stride_b"), py::arg("dp_stride_t"), py::arg("dp_stride_b"),
             py::arg("x_stride_t"), py::arg("x_stride_b"), py::arg("dx_stride_t"),
             py::arg("dx_stride_b"), py::arg("window"), py::arg("clip"), py::arg("threads"));
  module.def("rnn_plan", &rnn_plan, py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("S"),
             py::arg("directions"), py::arg("heads"), py::arg("threads"));
  module.def(
      "set_openmp",
      [](Address parallel, Address num_threads, Address thread_num, Address num_procs) {
        cpu::set_openmp({parallel, num_threads, thread_num, num_procs});
      },
      py::arg("GOMP_parallel"), py::arg("omp_get_num_threads"), py::arg("omp_get_thread_num"),
      py::arg("omp_get_num_procs"));
  module.def(
      "usable_threads",
      [](int wanted) {
        const cpu::Threads found = cpu::usable_threads(wanted);
        return std::make_pair(found.count, found.pool);
      },
      py::arg("wanted"));
  module.def("set_quota", &cpu::set_quota, py::arg("cores"));
  module.def("set_cores", &cpu::set_cores, py::arg("cores"));
  module.def("simd_level", [] { return std::string(cpu::kernels().level); });
  module.def("simd_levels", &cpu::simd_levels);
  module.def("set_simd_level", &cpu::set_simd_level, py::arg("level"));
  rnnfast::cuda::bind_plan(module);
#ifdef RNNFAST_CUDA  // what nvcc has compiled for
  rnnfast::cuda::bind_kernels(module);
  module.attr("cuda_archs") = RNNFAST_CUDA;
#endif
}
