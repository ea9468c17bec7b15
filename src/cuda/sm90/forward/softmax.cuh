// The online softmax of one warpgroup's 64 rows, in registers; scores lie as wgmma leaves them (see ptx/wgmma.cuh).
// Milakov and Gimelshein, arXiv 1805.02867.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/forward/tile_plan.h"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

// A thread has parts of two rows; index 0 and 1 below. Sums are of this thread's columns only until the end.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float moment[2] = {0.0f, 0.0f};  // of p log2(p), p relative to the maximum; for the entropy
};

template <int kCount>
__device__ __forceinline__ float row_max(const float (&scores)[kCount], int row) {
  float parts[4];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float value = scores[4 * (i / 2) + 2 * row + i % 2];
    parts[i % 4] = i < 4 ? value : max_nan(parts[i % 4], value);
  }
  float result = max_nan(max_nan(parts[0], parts[1]), max_nan(parts[2], parts[3]));
  result = max_nan(result, __shfl_xor_sync(0xFFFFFFFFu, result, 1));
  return max_nan(result, __shfl_xor_sync(0xFFFFFFFFu, result, 2));
}

// Scores become probabilities relative to the new maximum of each row, tops being that of these scores. correction is
// what the output so far has to be multiplied with.
template <bool kMoment, int kCount>
__device__ __forceinline__ void exponentiate(float (&scores)[kCount], const float (&tops)[2], RowState& state,
                                             float (&correction)[2], float scale_log2) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float before = state.max[row], top = max_nan(before, tops[row]);
    state.max[row] = top;
    const float base = top == -INFINITY ? 0.0f : top;  // rows that have seen no key yet keep -inf - 0
    const float shift = base * scale_log2;
    correction[row] = exp2_fast((before - base) * scale_log2);
    float sum = 0.0f, moment = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      float& score = scores[4 * (i / 2) + 2 * row + i % 2];
      const float exponent = fmaf(score, scale_log2, -shift);
      score = exp2_fast(exponent);
      sum += score;
      // Below -200 the power is 0, and -inf times it would be NaN.
      if (kMoment) moment = fmaf(score, fmaxf(exponent, -200.0f), moment);
    }
    if (kMoment) {
      const float moved = (before - base) * scale_log2;
      const float old = state.sum[row] == 0.0f ? 0.0f : fmaf(state.sum[row], moved, state.moment[row]);
      state.moment[row] = fmaf(old, correction[row], moment);
    }
    state.sum[row] = fmaf(state.sum[row], correction[row], sum);
  }
}

// The same for one row when its maximum so far stays the reference: probabilities may exceed 1. Returns the sum of
// these.
template <int kCount>
__device__ __forceinline__ float exponentiate_kept(float (&scores)[kCount], int row, const RowState& state,
                                                   float scale_log2) {
  const float shift = state.max[row] * scale_log2;
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    float& score = scores[4 * (i / 2) + 2 * row + i % 2];
    score = exp2_fast(fmaf(score, scale_log2, -shift));
    sums[i % 2] += score;
  }
  return sums[0] + sums[1];
}

// Never true of sums that are of use, and nothing happens if it is: a branch on the sum, over which the assembler moves
// none of the exponentials that it is made of.
__device__ __forceinline__ void stay_before(float sum) {
  asm volatile("{\n.reg .pred p;\nsetp.gt.f32 p, %0, 0f7E967699;\n@p nanosleep.u32 1;\n}\n" ::"f"(sum) : "memory");
}

// Whether this thread's part of a row, whose reference was kept, needs no closer look: what its probabilities add up to
// leaves out no more of float32's range than probabilities of at most 1 do.
__device__ __forceinline__ bool is_plainly_right(const RowState& state, int row, int key_count) {
  return state.max[row] != -INFINITY && state.sum[row] <= 0.25f * static_cast<float>(key_count);
}

// The closer look, at all columns of a row: probabilities that one thread summed are in every thread's output.
template <int kCount>
__device__ __forceinline__ bool reference_failed(const RowState& state, const float (&out)[kCount], int row) {
  constexpr float kMost = 0x1p64f;
  float probe = 0.0f;  // NaN where out is not finite
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) probe = fmaf(out[4 * (i / 2) + 2 * row + i % 2], 0.0f, probe);
  return state.max[row] == -INFINITY || !(state.sum[row] <= kMost) || probe != 0.0f;  // -inf: all scores so far
}

template <int kCount>
__device__ __forceinline__ void rescale(float (&out)[kCount], const float (&correction)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] *= correction[i / 2 % 2];
}

// out = out correction + of_step.
template <int kCount>
__device__ __forceinline__ void rescale_and_add(float (&out)[kCount], const float (&correction)[2],
                                                const float (&of_step)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = fmaf(out[i], correction[i / 2 % 2], of_step[i]);
}

// Hides what the queries of this thread's two rows do not see; first_key is the key of scores[0].
template <int kCount>
__device__ __forceinline__ void hide(float (&scores)[kCount], const TileGrid& grid, int key_count,
                                     const int (&queries)[2], int first_key) {
  const bool left = limited_left(grid);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    HiddenKeys hidden{};
    if (left)
      hidden = hidden_keys(visibility_of(grid, key_count), queries[row], first_key);
    else
      hidden.end = seen_end(grid, key_count, queries[row]) - first_key;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i)
      if (8 * (i / 2) + i % 2 >= hidden.end) scores[4 * (i / 2) + 2 * row + i % 2] = -INFINITY;
    if (!left) continue;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int key = 8 * (i / 2) + i % 2;
      if (key < hidden.begin && key >= hidden.sink_end) scores[4 * (i / 2) + 2 * row + i % 2] = -INFINITY;
    }
  }
}

}  // namespace adaattn::cuda::sm90
