#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

namespace rnnfast::cpu {
namespace {

// Each level asks for every extension that its kernels were compiled for (setup.py) but f16c: every
// machine with AVX2 has it, and not every compiler knows the name here.
#ifdef RNNFAST_BUILT_AVX2
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#ifdef RNNFAST_BUILT_AVX512
bool runs_avx512() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Never empty: without a level the module does not load.
const std::vector<Kernels>& usable() {
  static const std::vector<Kernels> levels = [] {
    std::vector<Kernels> found;
#ifdef RNNFAST_BUILT_PORTABLE
    found.push_back({"portable",
                     {&portable::kRnnTanh, &portable::kRnnRelu, &portable::kRnnSigmoid,
                      &portable::kRnnSoftplus, &portable::kLstm, &portable::kGru}});
#endif
#ifdef RNNFAST_BUILT_AVX2
    if (runs_avx2())
      found.push_back({"avx2",
                       {&avx2::kRnnTanh, &avx2::kRnnRelu, &avx2::kRnnSigmoid, &avx2::kRnnSoftplus,
                        &avx2::kLstm, &avx2::kGru}});
#endif
#ifdef RNNFAST_BUILT_AVX512
    if (runs_avx512())
      found.push_back({"avx512",
                       {&avx512::kRnnTanh, &avx512::kRnnRelu, &avx512::kRnnSigmoid,
                        &avx512::kRnnSoftplus, &avx512::kLstm, &avx512::kGru}});
#endif
    if (found.empty())
      throw std::runtime_error("none of the SIMD levels that were built runs on this processor");
    return found;
  }();
  return levels;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const CellKernels& Kernels::cell(const char* name) const {
  std::string known;
  for (const CellKernels* cell : cells) {
    if (std::strcmp(cell->name, name) == 0) return *cell;
    known += std::string(known.empty() ? "" : ", ") + cell->name;
  }
  throw std::invalid_argument("unknown cell '" + std::string(name) + "'; known: " + known);
}

Dtype dtype_named(const char* name) {
  constexpr struct {
    const char* name;
    Dtype dtype;
  } kDtypes[] = {{"float32", Dtype::kFloat32},
                 {"float64", Dtype::kFloat64},
                 {"bfloat16", Dtype::kBFloat16},
                 {"float16", Dtype::kFloat16}};
  for (const auto& known : kDtypes)
    if (std::strcmp(known.name, name) == 0) return known.dtype;
  throw std::invalid_argument("unknown dtype '" + std::string(name) +
                              "'; known: float32, float64, bfloat16, float16");
}

const Kernels& kernels() {
  const Kernels* level = chosen.load(std::memory_order_acquire);
  return level != nullptr ? *level : usable().back();
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Kernels& level : usable()) names.emplace_back(level.level);
  return names;
}

void set_simd_level(const std::string& level) {
  std::string names;
  for (const Kernels& candidate : usable()) {
    if (level == candidate.level) {
      chosen.store(&candidate, std::memory_order_release);
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + candidate.level;
  }
  throw std::invalid_argument("SIMD level '" + level + "' is not usable here; usable: " + names);
}

}  // namespace rnnfast::cpu
