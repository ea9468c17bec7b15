// Exact gradients on sm_90a: what the implementation table calls.
#pragma once

#include <cstddef>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::sm90 {

Reasons declines_backward(const adaattn_backward_args& args);
std::size_t backward_workspace(const adaattn_backward_args& args);
void backward(const adaattn_backward_args& args);

}  // namespace adaattn::cuda::sm90
