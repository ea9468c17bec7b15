// The tile sizes that are built for float32: the forward kernel with two bfloat16 terms an element.
#pragma once

#include "cuda/sm90/forward/launch.h"

namespace adaattn::cuda::sm90 {

using Float64 = ForwardConfig<ForwardTile{.dim = 64, .consumers = 2, .keys = 128, .stages = 3, .terms = 2}>;
using Float128 = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 80, .stages = 2, .terms = 2}>;
// Smaller steps: less waste at the diagonal, but the left operands of Q K^T are read from shared memory more often.
using Float64Narrow = ForwardConfig<ForwardTile{.dim = 64, .consumers = 2, .keys = 80, .stages = 4, .terms = 2}>;
using Float128Narrow = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 64, .stages = 2, .terms = 2}>;

// Variants that wait to be measured. Turns: consumers start their products in turns, passed on before the last ones, so
// that one's softmax meets the other's products. First: exponentials before the wait for the products with V.
using Float64Turns =
    ForwardConfig<ForwardTile{.dim = 64, .consumers = 2, .keys = 128, .stages = 3, .early_turn = 4, .terms = 2}>;
using Float128Turns =
    ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 80, .stages = 2, .early_turn = 2, .terms = 2}>;
using Float64First = ForwardConfig<ForwardTile{
    .dim = 64, .consumers = 2, .keys = 128, .stages = 3, .terms = 2, .exponentials_first = true}>;
using Float128First = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 80, .stages = 2, .terms = 2, .exponentials_first = true}>;
using Float128Both = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 80, .stages = 2, .early_turn = 2, .terms = 2, .exponentials_first = true}>;

}  // namespace adaattn::cuda::sm90
