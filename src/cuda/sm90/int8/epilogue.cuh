// Writes the rows of a tile: output in pieces of 16 bytes, and the log of the row's sum.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "cuda/sm90/int8/queries.cuh"

namespace adaattn::cuda::sm90 {

// tile_row is this thread's upper row in the tile. A row that saw no key becomes 0, its lse -inf.
template <typename Config>
__device__ __forceinline__ void store_int8_tile(const Int8Params& params, const TilePlan& plan, int tile_row,
                                                const float (&out)[Config::kOutputs], const QueryRow (&rows)[64]) {
  constexpr float kLn2 = 0.693147180559945f;
  const int lane = threadIdx.x % 32;
  const std::int64_t head = static_cast<std::int64_t>(plan.batch) * params.grid.heads + plan.head;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int query = plan.first_query + tile_row + 8 * row;
    const QueryRow& seen = rows[tile_row % 64 + 8 * row];
    const bool exists = query < params.grid.query_count;
    const float total = out[Config::kDim / 2 + 2 * row], inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if (exists && lane % 4 == 0 && params.lse != nullptr)
      params.lse[head * params.grid.query_count + query] =
          total == 0.0f ? -INFINITY : (seen.reference + log2f(total) + seen.shift) * kLn2;
    std::uint16_t* to = static_cast<std::uint16_t*>(params.out) + plan.batch * params.out_stride[0] +
                        plan.head * params.out_stride[1] + query * params.out_stride[2];
#pragma unroll
    for (int j = 0; j < Config::kDim / 32; ++j) {  // 32 columns: one piece of 8 a lane
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * row;
        const float low = out[at] * inverse, high = out[at + 1] * inverse;
        words[i] = params.bfloat16 ? pack<__nv_bfloat16>(low, high) : pack<__half>(low, high);
      }
      const uint4 piece = transpose_quad(words, lane);
      const int column = 32 * j + 8 * (lane % 4);
      if (exists && column < params.dim_v) *reinterpret_cast<uint4*>(to + column) = piece;
    }
  }
}

}  // namespace adaattn::cuda::sm90
