#include "cuda/host/launch.h"

#include <utility>

namespace rnnfast::cuda {
namespace {

struct Functions {
  void (*forward)(const Plan&, const Forward&, const Stream&);
  void (*backward)(const Plan&, const Backward&, const Stream&);
};

#define RNNFAST_FUNCTIONS(mode)                                             \
  switch (family) {                                                         \
    case Family::kSingleBlock:                                              \
      return {&mode::single_block::forward, &mode::single_block::backward}; \
    case Family::kCluster:                                                  \
      return {&mode::cluster::forward, &mode::cluster::backward};           \
    case Family::kStreaming:                                                \
      return {&mode::streaming::forward, &mode::streaming::backward};       \
  }                                                                         \
  return {}

Functions functions(Mode mode, Family family) {
  switch (mode) {
    case Mode::kBFloat16:
      RNNFAST_FUNCTIONS(bfloat16);
    case Mode::kFloat16:
      RNNFAST_FUNCTIONS(float16);
    case Mode::kTf32:
      RNNFAST_FUNCTIONS(tf32);
    case Mode::kExact:
      RNNFAST_FUNCTIONS(exact);
  }
  return {};
}

}  // namespace

void forward(const Plan& plan, const Forward& problem, const Stream& stream) {
  functions(plan.mode, plan.family).forward(plan, problem, stream);
}

void backward(const Plan& plan, const Backward& problem, const Stream& stream) {
  functions(plan.mode, plan.family).backward(plan, problem, stream);
}

int clusters(Mode mode, int device, int blocks) {
  switch (mode) {
    case Mode::kBFloat16:
      return bfloat16::cluster::clusters(device, blocks);
    case Mode::kFloat16:
      return float16::cluster::clusters(device, blocks);
    case Mode::kTf32:
      return tf32::cluster::clusters(device, blocks);
    case Mode::kExact:
      return exact::cluster::clusters(device, blocks);
  }
  return 0;
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
    for (int i = 0; i < streamed_blocks(mode); ++i) {
      names.push_back("streaming_" + std::string(name) + "_" +
                      std::to_string(16 * kStreamedBlocks[i].tiles) + "x" +
                      std::to_string(8 * kStreamedBlocks[i].slices));
    }
  }
  return names;
}

}  // namespace rnnfast::cuda
