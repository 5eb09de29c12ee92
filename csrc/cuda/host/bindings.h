// What Python sees of the kernels for GPUs: their plan in rnnfast._C always, themselves where nvcc
// has compiled them, and both in _emulated, where they run on the host. Addresses and sizes,
// checked by the caller (rnnfast/backends/cuda.py).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/host/launch.h"

namespace rnnfast::cuda {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Mode mode_named(const std::string& name) {
  if (name == "bfloat16") return Mode::kBFloat16;
  if (name == "float16") return Mode::kFloat16;
  if (name == "tf32") return Mode::kTf32;
  if (name == "exact") return Mode::kExact;
  throw std::invalid_argument("unknown mode '" + name + "'");
}

inline Nonlinearity function_named(const std::string& name) {
  if (name == "tanh") return Nonlinearity::kTanh;
  if (name == "relu") return Nonlinearity::kRelu;
  if (name == "sigmoid") return Nonlinearity::kSigmoid;
  throw std::invalid_argument("unknown nonlinearity '" + name + "'");
}

inline void bind_plan(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<Plan>(module, "CudaPlan", py::module_local())  // in either module
      .def_readonly("refused", &Plan::refused)
      .def_readonly("columns", &Plan::columns)
      .def_readonly("slices", &Plan::slices)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("weight_registers", &Plan::weight_registers)
      .def_readonly("shared", &Plan::shared)
      .def_readonly("cycles", &Plan::cycles)
      .def_readonly("step", &Plan::step)
      .def_readonly("workspace", &Plan::workspace)
      .def_property_readonly("streaming",
                             [](const Plan& plan) { return plan.family == Family::kStreaming; })
      .def_property_readonly("wanted",
                             [](const Plan& plan) {
                               const Wanted names = wanted(plan);
                               return std::tuple(names.blocks, names.columns, names.units);
                             })
      .def_property_readonly("cluster", [](const Plan& plan) { return plan.configuration.blocks; })
      .def_property_readonly("staged",
                             [](const Plan& plan) { return plan.configuration.staged > 0; })
      .def_property_readonly("units", [](const Plan& plan) { return plan.configuration.units; })
      .def("__str__", &text);

  const auto define = [&](const char* name, auto planned) {
    module.def(
        name,
        [planned](const std::string& mode, int units, int groups, int rows, bool norm,
                  const std::string& device, int capability, int multiprocessors, int shared_memory,
                  const std::array<int, 4>& clusters, int blocks, int columns, int of_units) {
          return planned(Size{units, groups, rows, mode_named(mode), norm},
                         Device{device, capability, multiprocessors, shared_memory, clusters},
                         Wanted{blocks, columns, of_units});
        },
        py::arg("mode"), py::arg("units"), py::arg("groups"), py::arg("rows"), py::arg("norm"),
        py::arg("device"), py::arg("capability"), py::arg("multiprocessors"),
        py::arg("shared_memory"), py::arg("clusters"), py::arg("wanted_blocks") = 0,
        py::arg("wanted_columns") = 0, py::arg("wanted_units") = 0);
  };
  define("cuda_plan", &plan);
  define("cuda_plans", &plans);
}

inline void bind_kernels(pybind11::module_& module) {
  namespace py = pybind11;
  using std::int64_t;
  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("cuda_unusable", &unusable, no_gil);
  module.def("cuda_kernels", &kernels);
  module.def(
      "cuda_clusters",
      [](const std::string& mode, int device) {
        std::array<int, 4> found;
        for (int i = 0; i < 4; ++i) found[i] = clusters(mode_named(mode), device, kClusterSizes[i]);
        return found;
      },
      no_gil, py::arg("mode"), py::arg("device"));

  module.def(
      "cuda_forward",
      [](const Plan& plan, const std::string& nonlinearity, Address p, Address w_hh, Address gamma,
         Address beta, Address h_0, Address lengths, Address reset, Address y, Address h_n,
         Address ahat, Address rstd, Address workspace, int steps, int batch, int size, int heads,
         int groups, bool paired, int64_t p_t, int64_t p_b, int64_t y_t, int64_t y_b,
         float norm_eps, int device, Address stream) {
        Forward problem;
        problem.shape = {
            steps, batch, size, heads, groups, plan.columns, 1.0f / static_cast<float>(size),
            paired};
        problem.nonlinearity = function_named(nonlinearity);
        problem.norm_eps = norm_eps;
        problem.p = at(p);
        problem.w_hh = at(w_hh);
        problem.gamma = at<float>(gamma);
        problem.beta = at<float>(beta);
        problem.h_0 = at(h_0);
        problem.lengths = at<const int64_t>(lengths);
        problem.reset = at<const std::uint8_t>(reset);
        problem.y = at(y);
        problem.h_n = at(h_n);
        problem.ahat = at(ahat);
        problem.rstd = at<float>(rstd);
        problem.workspace = at(workspace);
        problem.p_strides = {p_t, p_b};
        problem.y_strides = {y_t, y_b};
        forward(plan, problem, {device, stream});
      },
      no_gil, py::arg("plan"), py::arg("nonlinearity"), py::arg("p"), py::arg("w_hh"),
      py::arg("gamma"), py::arg("beta"), py::arg("h_0"), py::arg("lengths"), py::arg("reset"),
      py::arg("y"), py::arg("h_n"), py::arg("ahat"), py::arg("rstd"), py::arg("workspace"),
      py::arg("T"), py::arg("B"), py::arg("S"), py::arg("heads"), py::arg("groups"),
      py::arg("paired"), py::arg("p_t"), py::arg("p_b"), py::arg("y_t"), py::arg("y_b"),
      py::arg("norm_eps"), py::arg("device"), py::arg("stream"));

  module.def(
      "cuda_backward",
      [](const Plan& plan, const std::string& nonlinearity, Address grad_y, Address grad_h_n,
         Address y, Address w_hh, Address gamma, Address beta, Address ahat, Address rstd,
         Address lengths, Address reset, Address dp, Address dh_0, Address dgamma, Address dbeta,
         Address carry, Address workspace, int steps, int batch, int size, int heads, int groups,
         bool paired, int64_t g_t, int64_t g_b, int64_t y_t, int64_t y_b, int64_t a_t, int64_t a_b,
         int64_t dp_t, int64_t dp_b, int window, float limit, bool anew, int device,
         Address stream) {
        Backward problem;
        problem.shape = {
            steps, batch, size, heads, groups, plan.columns, 1.0f / static_cast<float>(size),
            paired};
        problem.nonlinearity = function_named(nonlinearity);
        problem.window = window;
        problem.limit = limit;
        problem.anew = anew;
        problem.grad_y = at(grad_y);
        problem.grad_h_n = at(grad_h_n);
        problem.y = at(y);
        problem.w_hh = at(w_hh);
        problem.gamma = at<float>(gamma);
        problem.beta = at<float>(beta);
        problem.ahat = at(ahat);
        problem.rstd = at<float>(rstd);
        problem.lengths = at<const int64_t>(lengths);
        problem.reset = at<const std::uint8_t>(reset);
        problem.dp = at(dp);
        problem.dh_0 = at(dh_0);
        problem.dgamma = at<float>(dgamma);
        problem.dbeta = at<float>(dbeta);
        problem.carry = at<float>(carry);
        problem.workspace = at(workspace);
        problem.grad_y_strides = {g_t, g_b};
        problem.y_strides = {y_t, y_b};
        problem.ahat_strides = {a_t, a_b};
        problem.dp_strides = {dp_t, dp_b};
        backward(plan, problem, {device, stream});
      },
      no_gil, py::arg("plan"), py::arg("nonlinearity"), py::arg("grad_y"), py::arg("grad_h_n"),
      py::arg("y"), py::arg("w_hh"), py::arg("gamma"), py::arg("beta"), py::arg("ahat"),
      py::arg("rstd"), py::arg("lengths"), py::arg("reset"), py::arg("dp"), py::arg("dh_0"),
      py::arg("dgamma"), py::arg("dbeta"), py::arg("carry"), py::arg("workspace"), py::arg("T"),
      py::arg("B"), py::arg("S"), py::arg("heads"), py::arg("groups"), py::arg("paired"),
      py::arg("g_t"), py::arg("g_b"), py::arg("y_t"), py::arg("y_b"), py::arg("a_t"),
      py::arg("a_b"), py::arg("dp_t"), py::arg("dp_b"), py::arg("window"), py::arg("limit"),
      py::arg("anew"), py::arg("device"), py::arg("stream"));

  module.def(
      "cuda_measure",
      [](const Plan& plan, const std::string& nonlinearity, Address carry, Address grad_y,
         Address grad_h_n, Address y, Address dp, Address lengths, Address reset, Address record,
         bool per_sample, int steps, int batch, int size, int heads, int groups, int64_t g_t,
         int64_t g_b, int64_t y_t, int64_t y_b, int64_t dp_t, int64_t dp_b, int window, float limit,
         int device, Address stream) {
        Measured problem;
        problem.shape = {steps, batch, size, heads, groups, 0, 0, false};
        problem.nonlinearity = function_named(nonlinearity);
        problem.window = window;
        problem.limit = limit;
        problem.per_sample = per_sample;
        problem.carry = at<float>(carry);
        problem.grad_y = at(grad_y);
        problem.grad_h_n = at(grad_h_n);
        problem.y = at(y);
        problem.dp = at(dp);
        problem.lengths = at<const int64_t>(lengths);
        problem.reset = at<const std::uint8_t>(reset);
        problem.record = at<double>(record);
        problem.grad_y_strides = {g_t, g_b};
        problem.y_strides = {y_t, y_b};
        problem.dp_strides = {dp_t, dp_b};
        measure(plan.mode, problem, {device, stream});
      },
      no_gil, py::arg("plan"), py::arg("nonlinearity"), py::arg("carry"), py::arg("grad_y"),
      py::arg("grad_h_n"), py::arg("y"), py::arg("dp"), py::arg("lengths"), py::arg("reset"),
      py::arg("record"), py::arg("per_sample"), py::arg("T"), py::arg("B"), py::arg("S"),
      py::arg("heads"), py::arg("groups"), py::arg("g_t"), py::arg("g_b"), py::arg("y_t"),
      py::arg("y_b"), py::arg("dp_t"), py::arg("dp_b"), py::arg("window"), py::arg("limit"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace rnnfast::cuda
