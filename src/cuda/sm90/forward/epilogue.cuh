// From accumulators to global memory: divides by the row sums, and writes rows in pieces of 16 bytes.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

// first_row is this thread's upper row. A row that saw no key becomes 0, its lse -inf.
template <typename T, typename Config>
__device__ __forceinline__ void store_tile(const ForwardParams& params, const TilePlan& plan, int first_row,
                                           const float (&out)[Config::kDim / 2], const RowState& state) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float sum = state.sum[row];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int query = first_row + 8 * row;
    const bool exists = query < params.query_count;
    if (exists && params.lse != nullptr && lane % 4 == 0) {
      constexpr float kLn2 = 0.693147180559945f;
      const float lse = sum == 0.0f ? -INFINITY : (state.max[row] * params.scale_log2 + log2f(sum)) * kLn2;
      params.lse[(static_cast<std::int64_t>(plan.batch) * params.heads + plan.head) * params.query_count + query] = lse;
    }
    T* to = static_cast<T*>(params.out) + plan.batch * params.out_stride[0] + plan.head * params.out_stride[1] +
            query * params.out_stride[2];
#pragma unroll
    for (int j = 0; j < Config::kDim / 32; ++j) {  // 32 columns: one piece of 8 a lane
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * row;
        words[i] = pack<T>(out[at] * inverse, out[at + 1] * inverse);
      }
      const uint4 piece = transpose_quad(words, lane);
      const int column = 32 * j + 8 * (lane % 4);
      if (exists && column < params.dim_v) *reinterpret_cast<uint4*>(to + column) = piece;
    }
  }
}

}  // namespace adaattn::cuda::sm90
