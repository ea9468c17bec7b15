// Attention within an error budget on sm_90a: the host side.
#pragma once

#include <span>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm90 {

std::span<const ForwardKernel> adaptive_rows();

}  // namespace adaattn::cuda::sm90
