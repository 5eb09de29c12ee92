// rnnfast._emulated: the kernels for GPUs on the host, for tests alone.
#include "cuda/host/bindings.h"

#include "machine.h"

PYBIND11_MODULE(_emulated, module) {
  module.doc() = "The CUDA kernels of rnnfast on the host, thread by thread: for tests.";
  rnnfast::cuda::bind_plan(module);
  rnnfast::cuda::bind_kernels(module);
  module.def("set_seed", &rnnfast::emulation::set_seed, pybind11::arg("seed"),
             "Seeds the order in which threads take their turns.");
}
