// The exact kernel over listed blocks of keys, for the adaptive engine.
#pragma once

#include "adaattn/adaattn.h"
#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

constexpr int kListedKeys = 128;  // of a block

// Rows of the tiles that lists are for.
int listed_tile_rows(const adaattn_forward_args& args);

// q has heads, and sm90_forward takes the problem, without a window or key lengths and with D and Dv up to 128.
// next_item: in device memory, 0 before the launch.
void attend_listed(const adaattn_forward_args& args, const ForwardLists& lists, unsigned* next_item);

}  // namespace adaattn::cuda::sm90
