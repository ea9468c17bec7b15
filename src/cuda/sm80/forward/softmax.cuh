// The online softmax of 16 rows of one warp, in registers; scores lie as the products leave them (see ptx/mma.cuh).
// Milakov and Gimelshein, arXiv 1805.02867.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/sm80/reach.cuh"

namespace adaattn::cuda::sm80 {

// A lane has parts of two rows, 8 apart; index 0 and 1 below. Sums are of this lane's columns only until the end.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float moment[2] = {0.0f, 0.0f};  // of p log2(p), for the entropy
};

__device__ __forceinline__ float sum_of_quad(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

template <int kCount>
__device__ __forceinline__ float row_max(const float (&scores)[kCount], int row) {
  float parts[4];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float value = scores[4 * (i / 2) + 2 * row + i % 2];
    parts[i % 4] = i < 4 ? value : ptx::max_nan(parts[i % 4], value);
  }
  float result = ptx::max_nan(ptx::max_nan(parts[0], parts[1]), ptx::max_nan(parts[2], parts[3]));
  result = ptx::max_nan(result, __shfl_xor_sync(0xFFFFFFFFu, result, 1));
  return ptx::max_nan(result, __shfl_xor_sync(0xFFFFFFFFu, result, 2));
}

// Scores, times scale_log2 in units of log2, become probabilities relative to the new maximum of each row. correction
// is what the output so far has to be multiplied with.
template <bool kMoment, int kCount>
__device__ __forceinline__ void exponentiate(float (&scores)[kCount], RowState& state, float (&correction)[2],
                                             float scale_log2) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float before = state.max[row], top = ptx::max_nan(before, row_max(scores, row));
    state.max[row] = top;
    const float base = top == -INFINITY ? 0.0f : top;  // rows that have seen no key yet keep -inf - 0
    const float shift = base * scale_log2, moved = (before - base) * scale_log2;
    correction[row] = ptx::exp2_fast(moved);
    float sum = 0.0f, moment = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      float& score = scores[4 * (i / 2) + 2 * row + i % 2];
      const float exponent = fmaf(score, scale_log2, -shift);
      score = ptx::exp2_fast(exponent);
      sum += score;
      if (kMoment && score > 0.0f) moment = fmaf(score, exponent, moment);
    }
    if (kMoment && correction[row] > 0.0f)  // p log2(p) of all before, whose log2(p) all change by moved
      moment = fmaf(correction[row], fmaf(state.sum[row], moved, state.moment[row]), moment);
    if (kMoment) state.moment[row] = moment;
    state.sum[row] = fmaf(state.sum[row], correction[row], sum);
  }
}

// Hides what the query rows first_row and first_row + 8 do not see; first_key is the key of scores[0].
template <int kCount>
__device__ __forceinline__ void hide(float (&scores)[kCount], const Reach& reach, int first_row, int first_key) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Keys seen = keys_of(reach, first_row + 8 * row, first_row + 8 * row);
    const int sink_end = seen.sink_end - first_key, begin = seen.begin - first_key, end = seen.end - first_key;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int key = 8 * (i / 2) + i % 2;
      if (key >= end || (key < begin && key >= sink_end)) scores[4 * (i / 2) + 2 * row + i % 2] = -INFINITY;
    }
  }
}

}  // namespace adaattn::cuda::sm80
