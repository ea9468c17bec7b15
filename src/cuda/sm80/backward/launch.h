// The tile sizes that are built, and how the three kernels of a backward pass are launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm80/backward/config.h"

namespace adaattn::cuda::sm80 {

using BackwardDim64 = BackwardConfig<64, 128, 128>;
using BackwardDim128 = BackwardConfig<128, 64, 128>;
using BackwardDim256 = BackwardConfig<256, 32, 64>;  // dK and dV take as many registers, dQ's tiles the same

template <typename T, typename Config, bool kMasked>
void launch_backward(const BackwardParams& params, const RowParams& rows, cudaStream_t stream);

}  // namespace adaattn::cuda::sm80
