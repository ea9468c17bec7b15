// The tile sizes that are built, and how one of them is launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

using Dim64 = ForwardConfig<64, 3, 128, 4>;
using Dim128 = ForwardConfig<128, 2, 176, 2>;
using Dim128Masked = ForwardConfig<128, 2, 128, 2>;  // smaller steps waste less at the diagonal
using Dim256 = ForwardConfig<256, 2, 80, 2>;

// blocks: blocks of threads, each of which works on tiles until none is left.
template <typename T, typename Config>
void launch_forward(const ForwardParams& params, int blocks, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
