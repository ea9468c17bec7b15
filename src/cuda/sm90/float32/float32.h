// Forward attention for float32 on sm_90a's tensor cores: what the implementation table calls.
//
// Elements are split into two bfloat16 terms, and three products of terms make up a product (docs/decisions/0012). The
// kernel is that of 16-bit inputs; before it runs one that writes the terms to the workspace, after it one that does
// nothing unless an input is infinite: infinity has no terms, and the call is then computed again on ordinary cores.
#pragma once

#include <span>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm90 {

std::span<const ForwardKernel> float32_rows();

}  // namespace adaattn::cuda::sm90
