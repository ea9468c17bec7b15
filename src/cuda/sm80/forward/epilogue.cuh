// The end of a tile: divides by the row sums, writes the rows and what is asked for about them.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm80/forward/schedule.cuh"
#include "cuda/sm80/forward/softmax.cuh"
#include "cuda/sm80/store_rows.cuh"

namespace adaattn::cuda::sm80 {

// 16 rows, first_row being this lane's upper one. A row that saw no key becomes 0, its lse -inf, its statistics 0.
template <typename T, bool kGeneral, int kCount>
__device__ __forceinline__ void store_strip(const ForwardParams& params, const TilePlan& plan, int first_row,
                                            const float (&out)[kCount], const RowState& state, float scale_log2) {
  constexpr float kLn2 = 0.693147180559945f;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = sum_of_quad(state.sum[row]), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float moment = kGeneral ? sum_of_quad(state.moment[row]) : 0.0f;
    const int query = first_row + 8 * row;
    const bool exists = query < params.query_count;
    if (exists && threadIdx.x % 4 == 0) {
      const std::int64_t at =
          (static_cast<std::int64_t>(plan.batch) * params.heads + plan.head) * params.query_count + query;
      if (params.lse != nullptr)
        params.lse[at] = sum == 0.0f ? -INFINITY : (state.max[row] * scale_log2 + log2f(sum)) * kLn2;
      if (kGeneral && params.entropy != nullptr) {
        const float entropy = (log2f(sum) - moment * inverse) * kLn2;
        params.entropy[at] = sum == 0.0f ? 0.0f : entropy < 0.0f ? 0.0f : entropy;
      }
      if (kGeneral && params.max_probability != nullptr) params.max_probability[at] = inverse;
    }
    T* to = static_cast<T*>(params.out.data) + plan.batch * params.out.stride[0] + plan.head * params.out.stride[1] +
            query * params.out.stride[2];
    store_row(to, out, row, inverse, exists, params.dim_v);
  }
}

}  // namespace adaattn::cuda::sm80
