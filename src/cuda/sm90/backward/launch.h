// The tile sizes that are built, and how the kernels of a backward pass are launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/backward/config.h"

namespace adaattn::cuda::sm90 {

template <bool kOrdered>
using BackwardDim64 = BackwardConfig<64, 128, false, kOrdered>;
template <bool kOrdered>
using BackwardDim128 = BackwardConfig<128, 64, true, kOrdered>;
// For many queries: D to 128 without and with turns, D to 64.
template <bool kTurns>
using LateDim128 = BackwardConfig<128, 64, true, false, true, kTurns>;
using SplitDim64 = SplitConfig<64, 96>;

template <typename T, typename Config>
void launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
