// What a tile costs on this machine, in each precision.
#pragma once

#include <cstdint>

#include "cpu/quantized.h"
#include "plan/head_plan.h"

namespace adaattn::cpu {

// Times over that of a float32 tile's scores, for heads of this size; measured at the first call and kept.
TileCosts tile_times(std::int64_t dim);

// The copies in low precision whose tiles take less than three quarters of a float32 tile's time here.
Copies paying_copies();

}  // namespace adaattn::cpu
