// One pass over k and v: the keys of the screen, means of values, and the probe rows run exactly.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

// Fills k8, value_means, block_masses, chunk_masses, chunk_out, and flags k and v that are not finite (or whose values
// add up to more than float32 holds), for key heads with energy >= kLeastScreenEnergy; after launch_basis. k8's byte of
// (key, rank): key / 128 * 4096 + rank / 16 * 2048 + key % 128 / 8 * 128 + key % 8 * 16 + rank % 16, the core matrices
// of wgmma, K-major without swizzle. A probe row of NaN has NaN sums.
// Throws StatusError if the launch fails.
void launch_measure(const AdaptiveShape& shape, Rows16 q, Rows16 k, Rows16 v, const AdaptiveArrays& to,
                    cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
