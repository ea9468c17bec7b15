// The rank-32 stand-in of the screen, from samples of q and k, one per key head.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

// Fills y, z, y_means and energy, and sets not_finite to 0. energy: NaN if the sample is not finite; 0 if the sampled
// keys hardly differ, next to their mean; 1 with y = z = 0 if all scores are 0. fp16: values of y and z past 65,504 are
// cut off there.
// Throws StatusError if the launch fails.
void launch_basis(const AdaptiveShape& shape, Rows16 q, Rows16 k, const AdaptiveArrays& to, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
