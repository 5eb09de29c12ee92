#include "launch.h"

namespace rnnfast::cuda {

void forward(Mode mode, const Plan& plan, const Forward& problem, const Stream& stream) {
  switch (mode) {
    case Mode::kBFloat16:
      return bfloat16::single_block_forward(plan, problem, stream);
    case Mode::kFloat16:
      return float16::single_block_forward(plan, problem, stream);
    case Mode::kTf32:
      return tf32::single_block_forward(plan, problem, stream);
    case Mode::kExact:
      return exact::single_block_forward(plan, problem, stream);
  }
}

void backward(Mode mode, const Plan& plan, const Backward& problem, const Stream& stream) {
  switch (mode) {
    case Mode::kBFloat16:
      return bfloat16::single_block_backward(plan, problem, stream);
    case Mode::kFloat16:
      return float16::single_block_backward(plan, problem, stream);
    case Mode::kTf32:
      return tf32::single_block_backward(plan, problem, stream);
    case Mode::kExact:
      return exact::single_block_backward(plan, problem, stream);
  }
}

void measure(Mode mode, const Measured& problem, const Stream& stream) {
  switch (mode) {
    case Mode::kBFloat16:
      return bfloat16::measure(problem, stream);
    case Mode::kFloat16:
      return float16::measure(problem, stream);
    case Mode::kTf32:
      return tf32::measure(problem, stream);
    case Mode::kExact:
      return exact::measure(problem, stream);
  }
}

// All modes are compiled for the same devices.
std::string unusable(int device) { return bfloat16::unusable(device); }

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  const auto add = [&names](const char* mode, const Configuration& c) {
    names.push_back("single_block_" + std::string(mode) + "_" + std::to_string(c.units));
  };
  for (const char* mode : {"bfloat16", "float16"}) {
    for (const Configuration& c : kHalfConfigurations) add(mode, c);
  }
  for (const char* mode : {"tf32", "exact"}) {
    for (const Configuration& c : kSingleConfigurations) add(mode, c);
  }
  return names;
}

}  // namespace rnnfast::cuda
