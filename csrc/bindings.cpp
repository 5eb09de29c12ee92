// rnnfast._C: addresses and sizes in, nothing checked but names. Shapes, dtypes and devices were
// checked by the caller (rnnfast/backends/cpu.py), which also owns all memory.
#include "cuda/host/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fields.h"
#include "keywords.h"

namespace py = pybind11;
namespace cpu = rnnfast::cpu;

namespace {

using std::int64_t;
using Address = std::uintptr_t;

static_assert(rnnfast::count_visited<cpu::Shape>() == rnnfast::count_fields<cpu::Shape>());
static_assert(rnnfast::visits_all_fields<cpu::ForwardProblem, cpu::Shape>());
static_assert(rnnfast::visits_all_fields<cpu::BackwardProblem, cpu::Shape>());

// name(*, every field of Problem): runs the kernel of the cell that the problem names.
template <class Problem, void (*cpu::CellKernels::*kKernel)(const Problem&)>
PyObject* call(PyObject* name, PyObject* const* values, Py_ssize_t positional, PyObject* given) {
  return rnnfast::none_or_error([&] {
    const auto problem =
        rnnfast::Keywords::read<Problem>(PyUnicode_AsUTF8(name), values, positional, given);
    const auto kernel = cpu::kernels().cell(problem.cell).*kKernel;
    const py::gil_scoped_release no_gil;
    kernel(problem);
  });
}

// (tasks, parts of each, threads): how a call would be cut up.
std::tuple<int64_t, int64_t, int> rnn_plan(const char* cell, const char* dtype, int64_t steps,
                                           int64_t batch, int64_t size, int64_t directions,
                                           int64_t heads, int threads) {
  const cpu::Shape shape = {steps, batch, size, directions, heads};
  const cpu::Plan plan = cpu::kernels().cell(cell).plan(cpu::dtype_named(dtype), shape, threads);
  return {plan.tasks(), plan.parts, plan.threads};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of rnnfast: addresses (None: no tensor), sizes in elements.";
  cpu::kernels();  // or the module does not load
  rnnfast::define<&call<cpu::ForwardProblem, &cpu::CellKernels::forward>>(module, "rnn_forward");
  rnnfast::define<&call<cpu::BackwardProblem, &cpu::CellKernels::backward>>(module, "rnn_backward");
  module.def("rnn_plan", &rnn_plan, py::arg("cell"), py::arg("dtype"), py::arg("steps"),
             py::arg("batch"), py::arg("size"), py::arg("directions"), py::arg("heads"),
             py::arg("threads"));
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
