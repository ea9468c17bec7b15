// The tile sizes that are built, and how one of them is launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm80/forward/config.h"

namespace adaattn::cuda::sm80 {

using Dim64 = ForwardConfig<64, 4, 2, 64, 4, 3, false>;
using Dim128 = ForwardConfig<128, 4, 2, 64, 3, 2, false>;
using Dim256 = ForwardConfig<256, 8, 1, 64, 3, 1, false>;

template <typename T, typename Config, bool kGeneral>
void launch_forward(const ForwardParams& params, int blocks, cudaStream_t stream);

}  // namespace adaattn::cuda::sm80
