// Exact float32 attention on ordinary cores of any device: what the implementation table calls.
#pragma once

#include "cuda/simt/launch.h"
#include "dispatch/kernel_table.h"

namespace adaattn::cuda::simt {

Reasons declines_forward(const adaattn_forward_args& args);
std::size_t forward_workspace(const adaattn_forward_args& args);
void forward(const adaattn_forward_args& args);

// What launch_forward takes of a call that is not declined.
ForwardParams make_params(const adaattn_forward_args& args);

}  // namespace adaattn::cuda::simt
