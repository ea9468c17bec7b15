// Exact attention on sm_80, forward: what the implementation table calls.
#pragma once

#include <cstddef>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm80 {

Reasons declines_forward(const adaattn_forward_args& args);
std::size_t forward_workspace(const adaattn_forward_args& args);
void forward(const adaattn_forward_args& args);

}  // namespace adaattn::cuda::sm80
