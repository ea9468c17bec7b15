// The last rows of the implementation table: the FP64 reference, rounded to the output's dtype.
#pragma once

#include <span>

#include "dispatch/kernel_table.h"

namespace adaattn::reference {

std::span<const ForwardKernel> forward_kernels();
std::span<const BackwardKernel> backward_kernels();

}  // namespace adaattn::reference
