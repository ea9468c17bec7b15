// The rows of the implementation table that run on CPUs.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "dispatch/kernel_table.h"

namespace adaattn::cpu {

std::span<const ForwardKernel> forward_kernels();
std::span<const BackwardKernel> backward_kernels();

// Instruction sets that the kernels were built for and this machine has, best first.
std::vector<std::string> instruction_sets();

}  // namespace adaattn::cpu
