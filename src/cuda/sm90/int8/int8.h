// Dense 8-bit attention for sm_90a: rows of the implementation table, which run only when they are named.
#pragma once

#include <span>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm90 {

std::span<const ForwardKernel> int8_rows();

}  // namespace adaattn::cuda::sm90
