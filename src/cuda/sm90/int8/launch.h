// The instances of the 8-bit forward kernel that are built, and how one of them is launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/forward/launch.h"
#include "cuda/sm90/int8/config.h"

namespace adaattn::cuda::sm90 {

using Int8Dim64 = Int8Config<Int8Tile{.dim = 64, .consumers = 3, .keys = 128, .stages = 4}>;
using Int8Dim128 = Int8Config<Int8Tile{.dim = 128, .consumers = 3, .keys = 80, .stages = 4}>;

template <typename Config>
void launch_int8(const Int8Params& params, const ForwardLaunch& launch);

}  // namespace adaattn::cuda::sm90
