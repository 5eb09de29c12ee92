#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace rnnfast::cpu {
namespace {

constexpr Kernels kPortable = {"portable", portable::elman_forward, portable::elman_backward,
                               portable::elman_plan};
#if defined(__x86_64__)
constexpr Kernels kAvx2 = {"avx2", avx2::elman_forward, avx2::elman_backward, avx2::elman_plan};
constexpr Kernels kAvx512 = {"avx512", avx512::elman_forward, avx512::elman_backward,
                             avx512::elman_plan};

// Each asks for every extension that its kernels were compiled for (setup.py), but f16c: every
// machine with AVX2 has it, and not every compiler knows the name here.
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> levels = [] {
    std::vector<const Kernels*> found = {&kPortable};
#if defined(__x86_64__)
    if (runs_avx2()) found.push_back(&kAvx2);
    if (runs_avx512()) found.push_back(&kAvx512);
#endif
    return found;
  }();
  return levels;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* level = chosen.load(std::memory_order_acquire);
  return level != nullptr ? *level : *usable().back();
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Kernels* level : usable()) names.emplace_back(level->level);
  return names;
}

void set_simd_level(const std::string& level) {
  std::string names;
  for (const Kernels* candidate : usable()) {
    if (level == candidate->level) {
      chosen.store(candidate, std::memory_order_release);
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + candidate->level;
  }
  throw std::invalid_argument("SIMD level '" + level + "' is not usable here; usable: " + names);
}

}  // namespace rnnfast::cpu
