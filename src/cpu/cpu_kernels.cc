#include "cpu/cpu_kernels.h"

namespace adaattn::cpu {

std::span<const ForwardKernel> forward_kernels() { return {}; }
std::span<const BackwardKernel> backward_kernels() { return {}; }
std::vector<std::string> instruction_sets() { return {}; }

}  // namespace adaattn::cpu
