// Mask tensors: their terms are read from global memory, one by one, and added to the scores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

// 0 or the mask's value in units of log2 where it shows the key, -inf where it hides it. Finite values stay above
// -FLT_MAX / 2: the change of base would make -inf of what torch counts as a score, however low.
template <typename T>
__device__ __forceinline__ float mask_term(const MaskView& mask, std::int64_t at) {
  constexpr float kLog2E = 1.44269504088896341f;
  if (mask.kind == MaskView::kBool) return static_cast<const unsigned char*>(mask.data)[at] != 0 ? 0.0f : -INFINITY;
  float value;
  if (mask.kind == MaskView::kFloat)
    value = static_cast<const float*>(mask.data)[at];
  else if constexpr (std::is_same_v<T, __half>)
    value = __half2float(static_cast<const __half*>(mask.data)[at]);
  else
    value = __bfloat162float(static_cast<const __nv_bfloat16*>(mask.data)[at]);
  if (value < -FLT_MAX / 2 && value != -INFINITY) value = -FLT_MAX / 2;
  return value * kLog2E;
}

// Scores times scale, plus the mask's terms, in units of log2. rows are this thread's two; first_key is the key of
// scores[0]. Keys that a row does not see are not looked up: the caller hides them.
template <typename T, int kCount>
__device__ __forceinline__ void scale_and_mask(float (&scores)[kCount], const ForwardParams& params, int batch,
                                               const RowPlace (&rows)[2], const Visibility& visibility, int first_key) {
#pragma unroll
  for (float& score : scores) score *= params.scale_log2;
  const MaskView& mask = params.mask;
  if (mask.kind == MaskView::kNone) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (!rows[row].exists) continue;
    const HiddenKeys hidden = hidden_keys(visibility, rows[row].query, first_key);
    const std::int64_t first = batch * mask.stride[0] + rows[row].head * mask.stride[1] +
                               rows[row].query * mask.stride[2] + first_key * mask.stride[3];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int key = 8 * (i / 2) + i % 2;
      if (key >= hidden.end || (key < hidden.begin && key >= hidden.sink_end)) continue;
      float& score = scores[4 * (i / 2) + 2 * row + i % 2];
      const float term = mask_term<T>(mask, first + key * mask.stride[3]);
      score = term == -INFINITY ? term : score + term;  // a hidden key's score may be NaN
    }
  }
}

}  // namespace adaattn::cuda::sm90
