// Exact forward attention on sm_90a: what the implementation table calls. One instance of the kernel for each use; each
// leaves to the others what they are better at, unless options.kernel names it.
#pragma once

#include <span>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm90 {

std::span<const ForwardKernel> forward_rows();

}  // namespace adaattn::cuda::sm90
