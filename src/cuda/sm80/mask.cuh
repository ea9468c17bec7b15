// Mask tensors, read where a score is: slow, but any strides and types will do.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm80/mask_view.h"

namespace adaattn::cuda::sm80 {

// 0 or the additive mask's value where it shows the key, -inf where it hides it. at counts elements.
template <typename T>
__device__ __forceinline__ float mask_term(const MaskView& mask, std::int64_t at) {
  if (mask.dtype == ADAATTN_BOOL) return static_cast<const std::uint8_t*>(mask.data)[at] != 0 ? 0.0f : -INFINITY;
  const float value = mask.dtype == ADAATTN_FLOAT32 ? static_cast<const float*>(mask.data)[at]
                                                    : static_cast<float>(static_cast<const T*>(mask.data)[at]);
  // Finite terms stay finite when the logarithm's base changes.
  constexpr float kLowest = -1.7e38f;
  return value < kLowest && value != -INFINITY ? kLowest : value;
}

__device__ __forceinline__ std::int64_t mask_offset(const MaskView& mask, int batch, int head, int query, int key) {
  return batch * mask.stride[0] + head * mask.stride[1] + query * mask.stride[2] + key * mask.stride[3];
}

}  // namespace adaattn::cuda::sm80
