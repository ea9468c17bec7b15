// From accumulators to global memory: divides by the row sums, and writes rows in pieces of 8 bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/row_result.cuh"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

// scale_log2 turns the maxima of state to base 2.
template <bool kStatistics>
__device__ __forceinline__ RowResult finish_row(const RowState& state, int row, float sum, float scale_log2) {
  RowResult result{.lse_log2 = sum == 0.0f ? -INFINITY : state.max[row] * scale_log2 + __log2f(sum)};
  if constexpr (kStatistics) {
    const float moment = quad_sum(state.moment[row]), entropy = kLn2 * (log2f(sum) - moment / sum);
    result.entropy = sum == 0.0f || entropy < 0.0f ? 0.0f : entropy;
    result.max_probability = sum == 0.0f ? 0.0f : 1.0f / sum;  // the largest is 1 before it is divided
  }
  return result;
}

// This thread's part of a float32 row of dim_v columns. Four threads write 32 bytes of it together.
template <typename Config>
__device__ __forceinline__ void write_row(float* to, const float (&out)[Config::kDim / 2], float inverse, int row,
                                          int dim_v) {
#pragma unroll
  for (int j = 0; j < Config::kDim / 8; ++j)
    if (8 * j < dim_v)
      *reinterpret_cast<float2*>(to + 8 * j + 2 * (threadIdx.x % 4)) =
          make_float2(out[4 * j + 2 * row] * inverse, out[4 * j + 2 * row + 1] * inverse);
}

// tile_row is this thread's upper row in the tile. A row that saw no key becomes 0, its lse -inf.
template <typename T, typename Config>
__device__ __forceinline__ void store_tile(const ForwardParams& params, const TilePlan& plan, int tile_row,
                                           const float (&out)[Config::kDim / 2], const RowState& state) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = quad_sum(state.sum[row]), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const RowPlace place = place_of_row<Config>(params.grid, plan, tile_row + 8 * row);
    const RowResult result = finish_row<Config::kMasks>(state, row, sum, Config::kMasks ? 1.0f : params.scale_log2);
    if (place.exists && lane % 4 == 0) store_row_result<Config::kMasks>(params, plan.batch, place, result);
    T* to = static_cast<T*>(params.out) + plan.batch * params.out_stride[0] + place.head * params.out_stride[1] +
            place.query * params.out_stride[2];
    if constexpr (std::is_same_v<T, float>) {
      write_row<Config>(to, out, inverse, row, place.exists ? params.dim_v : 0);
    } else {
#pragma unroll
      for (int j = 0; j < Config::kDim / 16; ++j) {  // 16 columns: 4 a lane, 32 bytes of a row side by side
        const auto word = [&](int i) {
          const int at = 4 * (2 * j + i) + 2 * row;
          return pack<T>(out[at] * inverse, out[at + 1] * inverse);
        };
        const uint2 piece = trade_pair(word(0), word(1), lane);
        const int column = 16 * j + 8 * (lane % 2) + 4 * (lane % 4 / 2);
        if (place.exists && column < params.dim_v) *reinterpret_cast<uint2*>(to + column) = piece;
      }
    }
  }
}

// The same through shared memory, of instances that stage their output. warp: of the consumers.
template <typename T, typename Config>
__device__ __forceinline__ void store_tile_staged(const ForwardParams& params, ForwardShared<Config>& shared,
                                                  const TilePlan& plan, int tile_row, int warp,
                                                  const float (&out)[Config::kDim / 2], const RowState& state) {
  const int lane = threadIdx.x % 32;
  float inverse[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = quad_sum(state.sum[row]);
    inverse[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const RowPlace place = place_of_row<Config>(params.grid, plan, tile_row + 8 * row);
    if (place.exists && lane % 4 == 0)
      store_row_result<false>(params, plan.batch, place, finish_row<false>(state, row, sum, params.scale_log2));
  }
  if (lane == 0) ptx::wait_sources_read();  // of the tile before
  __syncwarp();
  auto& rows = shared.output.rows[warp];
  // A store takes 16 rows and two pieces of 8 columns: lanes 0 to 15 name rows of the first piece, the others of the
  // second.
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(&rows[0][lane % 16][0]));
#pragma unroll
  for (int j = 0; j < Config::kDim / 16; ++j) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = pack<T>(out[8 * j + 2 * i] * inverse[i % 2], out[8 * j + 2 * i + 1] * inverse[i % 2]);
    const int piece = 2 * (j % 4) + lane / 16;
    ptx::store_matrices(base + j / 4 * sizeof(rows[0]) + static_cast<std::uint32_t>((piece ^ lane % 8) * 16), words);
  }
  ptx::fence_async_proxy();
  __syncwarp();
  const int query = plan.first_query + tile_row - lane / 4;
  if (lane == 0 && query < params.grid.query_count) {
#pragma unroll
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      if (64 * chunk < params.dim_v)
        ptx::store_box(params.out_boxes, rows[chunk], 64 * chunk, query, plan.head, plan.batch);
    ptx::commit_stores();
  }
}

// The same for a part of a tile's keys: float32, to the workspace.
template <typename Config>
__device__ __forceinline__ void store_part(const ForwardParams& params, const TilePlan& plan, int tile_row,
                                           const float (&out)[Config::kDim / 2], const RowState& state) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float sum = quad_sum(state.sum[row]), inverse = 1.0f / sum;
    const RowResult result = finish_row<Config::kMasks>(state, row, sum, Config::kMasks ? 1.0f : params.scale_log2);
    if (!place_of_row<Config>(params.grid, plan, tile_row + 8 * row).exists) continue;
    const std::int64_t slot = static_cast<std::int64_t>(plan.part) * Config::kQueries + tile_row + 8 * row;
    if (lane % 4 == 0) *reinterpret_cast<float4*>(params.part_rows + slot) = reinterpret_cast<const float4&>(result);
    if (sum == 0.0f) continue;
    write_row<Config>(params.part_out + slot * params.dim_v, out, inverse, row, params.dim_v);
  }
}

}  // namespace adaattn::cuda::sm90
