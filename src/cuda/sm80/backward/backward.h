// Exact gradients on sm_80: what the implementation table calls.
#pragma once

#include <cstddef>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm80 {

Reasons declines_backward(const adaattn_backward_args& args);
std::size_t backward_workspace(const adaattn_backward_args& args);
void backward(const adaattn_backward_args& args);

}  // namespace adaattn::cuda::sm80
