// Run-time choice among the SIMD levels that were built in, and among the cells.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace rnnfast::cpu {

// Each cell's source file defines its own, once per level.
namespace portable {
extern const CellKernels kRnnTanh, kRnnRelu, kRnnSigmoid, kRnnSoftplus, kLstm, kGru;
}
namespace avx2 {
extern const CellKernels kRnnTanh, kRnnRelu, kRnnSigmoid, kRnnSoftplus, kLstm, kGru;
}
namespace avx512 {
extern const CellKernels kRnnTanh, kRnnRelu, kRnnSigmoid, kRnnSoftplus, kLstm, kGru;
}

struct Kernels {
  const char* level;
  std::vector<const CellKernels*> cells;

  const CellKernels& cell(const char* name) const;  // std::invalid_argument for an unknown name
};

// The level in use: the best that this machine runs, until set_simd_level.
const Kernels& kernels();

std::vector<std::string> simd_levels();         // usable here, best last
void set_simd_level(const std::string& level);  // std::invalid_argument for any other name

Dtype dtype_named(const char* name);  // std::invalid_argument for an unknown name
inline void from_name(const char* name, Dtype& to) { to = dtype_named(name); }

}  // namespace rnnfast::cpu
