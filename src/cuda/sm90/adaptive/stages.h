// The stages that choose and check which blocks run; each is one launch, on the caller's stream.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

// Heads without a screen get all blocks at level 0.
void launch_order(const AdaptiveShape& shape, const AdaptiveArrays& arrays, cudaStream_t stream);

void launch_decide(const AdaptiveShape& shape, const AdaptiveArrays& arrays, cudaStream_t stream);

// Tells from the probe rows of out [batch, heads, queries, dim_v] which heads missed the budget, and lists them with
// all of their blocks.
void launch_verify(const AdaptiveShape& shape, Rows16 out, const AdaptiveArrays& arrays, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
