// What several stages ask of a head.
#pragma once

#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

__device__ __forceinline__ int key_head_of(const AdaptiveShape& shape, int head) {
  const int in_batch = head % shape.heads;
  return head / shape.heads * (shape.heads / shape.group) + in_batch / shape.group;
}

// Whether the screen's distances, and what measure leaves, are there.
__device__ __forceinline__ bool is_screened(const AdaptiveShape& shape, const AdaptiveArrays& arrays, int head) {
  const int key_head = key_head_of(shape, head);
  return arrays.energy[key_head] >= kLeastScreenEnergy && arrays.not_finite[key_head] == 0;
}

// The four threads of a row add up what each has of it.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

// Sums over the 8 rows of a warp whose threads of a row hold the same; every thread gets them.
__device__ __forceinline__ float warp_rows_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 4);
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 8);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 16);
}

}  // namespace adaattn::cuda::sm90
