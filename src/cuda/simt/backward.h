// Exact float32 gradients on ordinary cores of any device: what the implementation table calls.
#pragma once

#include <cstddef>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda::simt {

Reasons declines_backward(const adaattn_backward_args& args);
std::size_t backward_workspace(const adaattn_backward_args& args);
void backward(const adaattn_backward_args& args);

}  // namespace adaattn::cuda::simt
