// The tile sizes that are built for float32: the forward kernel with two bfloat16 terms an element.
#pragma once

#include "cuda/sm90/forward/launch.h"

namespace adaattn::cuda::sm90 {

using Float64 = ForwardConfig<ForwardTile{.dim = 64, .consumers = 2, .keys = 128, .stages = 3, .terms = 2}>;
using Float128 = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 80, .stages = 2, .terms = 2}>;

}  // namespace adaattn::cuda::sm90
