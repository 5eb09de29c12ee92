#include "launch.h"

#include <utility>

namespace rnnfast::cuda {
namespace {

struct Functions {
  void (*forward)(const Plan&, const Forward&, const Stream&);
  void (*backward)(const Plan&, const Backward&, const Stream&);
  int (*clusters)(int device, int blocks);
};

#define RNNFAST_FUNCTIONS(mode, family) \
  Functions { &mode::family::forward, &mode::family::backward, &mode::family::clusters }

Functions functions(Mode mode, bool cluster) {
  switch (mode) {
    case Mode::kBFloat16:
      return cluster ? RNNFAST_FUNCTIONS(bfloat16, cluster)
                     : RNNFAST_FUNCTIONS(bfloat16, single_block);
    case Mode::kFloat16:
      return cluster ? RNNFAST_FUNCTIONS(float16, cluster)
                     : RNNFAST_FUNCTIONS(float16, single_block);
    case Mode::kTf32:
      return cluster ? RNNFAST_FUNCTIONS(tf32, cluster) : RNNFAST_FUNCTIONS(tf32, single_block);
    case Mode::kExact:
      return cluster ? RNNFAST_FUNCTIONS(exact, cluster) : RNNFAST_FUNCTIONS(exact, single_block);
  }
  return {};
}

bool is_cluster(const Plan& plan) { return plan.configuration.blocks > 1; }

}  // namespace

void forward(Mode mode, const Plan& plan, const Forward& problem, const Stream& stream) {
  functions(mode, is_cluster(plan)).forward(plan, problem, stream);
}

void backward(Mode mode, const Plan& plan, const Backward& problem, const Stream& stream) {
  functions(mode, is_cluster(plan)).backward(plan, problem, stream);
}

int clusters(Mode mode, int device, int blocks) {
  return functions(mode, true).clusters(device, blocks);
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  const std::pair<const char*, Mode> modes[] = {{"bfloat16", Mode::kBFloat16},
                                                {"float16", Mode::kFloat16},
                                                {"tf32", Mode::kTf32},
                                                {"exact", Mode::kExact}};
  for (const auto& [name, mode] : modes) {
    for (const Configuration& c : configurations(mode, Family::kSingleBlock)) {
      names.push_back("single_block_" + std::string(name) + "_" + std::to_string(c.units));
    }
    for (const Configuration& c : configurations(mode, Family::kCluster)) {
      names.push_back("cluster" + std::to_string(c.blocks) + "_" + name + "_" +
                      std::to_string(c.units));
    }
  }
  return names;
}

}  // namespace rnnfast::cuda
