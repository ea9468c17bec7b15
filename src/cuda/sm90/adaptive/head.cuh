// What several stages ask of a head.
#pragma once

#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

__device__ __forceinline__ int key_head_of(const AdaptiveShape& shape, int head) { return head / shape.group; }

// Whether the screen's distances, and what measure leaves, are there.
__device__ __forceinline__ bool is_screened(const AdaptiveShape& shape, const AdaptiveArrays& arrays, int head) {
  const int key_head = key_head_of(shape, head);
  return arrays.energy[key_head] >= kLeastScreenEnergy && arrays.not_finite[key_head] == 0;
}

}  // namespace adaattn::cuda::sm90
