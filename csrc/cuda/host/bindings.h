// The CUDA kernels for Python. rnnfast._C always has their plan, and the kernels where nvcc has
// compiled them; _emulated has both, on the host. The caller (rnnfast/backends/cuda.py) has checked
// shapes, dtypes and devices.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/host/launch.h"
#include "fields.h"
#include "keywords.h"

namespace rnnfast::cuda {

inline Mode mode_named(const std::string& name) {
  if (name == "bfloat16") return Mode::kBFloat16;
  if (name == "float16") return Mode::kFloat16;
  if (name == "tf32") return Mode::kTf32;
  if (name == "exact") return Mode::kExact;
  throw std::invalid_argument("unknown mode '" + name + "'");
}

constexpr std::size_t kSetByTheLaunch = 2;  // columns and inv_size, which no caller gives
static_assert(count_visited<Shape>() == count_fields<Shape>() - kSetByTheLaunch);
static_assert(visits_all_fields<Forward, Shape>());
static_assert(visits_all_fields<Backward, Shape>());
static_assert(visits_all_fields<Measured, Shape>());

// A problem with the stream that its kernels go to.
template <class Problem>
struct OnStream {
  Problem problem;
  Stream stream;
};

template <class Problem, class Visit>
void visit_fields(OnStream<Problem>& call, Visit&& visit) {
  visit_fields(call.problem, visit);
  visit("device", call.stream.device);
  visit("stream", call.stream.handle);
}

// name(plan, *, every field of OnStream<Problem>): enqueues the kernels of a problem.
template <class Problem, void (*kLaunch)(const Plan&, const Problem&, const Stream&)>
PyObject* call(PyObject* name, PyObject* const* values, Py_ssize_t positional, PyObject* given) {
  return none_or_error([&] {
    namespace py = pybind11;
    if (positional == 0 || !py::isinstance<Plan>(values[0])) {
      throw py::type_error("a launch wants its plan first");
    }
    const auto& plan = py::cast<const Plan&>(py::handle(values[0]));
    auto [problem, stream] = Keywords::read<OnStream<Problem>>(PyUnicode_AsUTF8(name), values + 1,
                                                               positional - 1, given);
    problem.shape.columns = plan.columns;
    problem.shape.inv_size = 1.0f / static_cast<float>(problem.shape.size);
    const py::gil_scoped_release no_gil;
    kLaunch(plan, problem, stream);
  });
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
      .def_property_readonly(
          "shared_weights", [](const Plan& plan) { return plan.configuration.shared_products > 0; })
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

  define<&call<Forward, forward>>(module, "cuda_forward");
  define<&call<Backward, backward>>(module, "cuda_backward");
  define<&call<Measured, measure>>(module, "cuda_measure");
}

}  // namespace rnnfast::cuda
