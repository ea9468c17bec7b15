// What the backward pass does once per query row: before the main kernel delta and lse, after it the rounding of dQ.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm80/backward/config.h"
#include "cuda/sm80/store_rows.cuh"

namespace adaattn::cuda::sm80 {

// 16 lanes a row: delta = rowsum(dO O) and lse / ln 2. A row that sees no key, or does not exist, gets +inf for its
// lse, which makes its probabilities 0.
template <typename T, typename Config>
__global__ void prepare_rows_kernel(const RowParams params) {
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 16;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const std::int64_t rows_per_head = static_cast<std::int64_t>(params.query_tiles) * Config::kQueries;
  const std::int64_t head = row / rows_per_head;
  const int query = static_cast<int>(row % rows_per_head);
  const std::int64_t b = head / params.heads, h = head % params.heads;
  const bool inside = head < static_cast<std::int64_t>(params.batch) * params.heads;
  const bool exists = inside && query < params.query_count;
  float delta = 0.0f;
  const auto row_of = [&](const MatrixView& view) {
    return static_cast<const T*>(view.data) + b * view.stride[0] + h * view.stride[1] + query * view.stride[2];
  };
  const T *out = row_of(params.out), *dout = row_of(params.dout);
#pragma unroll
  for (int first = 0; first < Config::kDim; first += 128) {
    const int column = first + lane * 8;
    if (!exists || column >= params.dim_v) continue;
    const uint4 outs = *reinterpret_cast<const uint4*>(out + column);
    const uint4 douts = *reinterpret_cast<const uint4*>(dout + column);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      delta = fmaf(static_cast<float>(reinterpret_cast<const T*>(&outs)[i]),
                   static_cast<float>(reinterpret_cast<const T*>(&douts)[i]), delta);
  }
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) delta += __shfl_xor_sync(0xFFFFFFFFu, delta, distance);
  if (!inside || lane != 0) return;
  float lse = INFINITY;
  if (exists) {
    constexpr float kLog2e = 1.4426950408889634f;
    const float given = params.lse[head * params.query_count + query];
    if (given != -INFINITY) lse = given * kLog2e;
  }
  float* to = params.rows + row / Config::kQueries * 2 * Config::kQueries + query % Config::kQueries;
  to[0] = lse;
  to[Config::kQueries] = delta;
}

// dq = scale * sums: one block of threads a tile, each warp its tile of 32 queries by 32 columns.
template <typename T, typename Config>
__global__ void finish_dq_kernel(const RowParams params) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t tile = blockIdx.x, head = tile / params.query_tiles;
  const float* from = params.dq_sums + (tile * Config::kWarps + warp) * 1024 + lane;
  const int first_column = warp / Config::kDqRowTiles * 32;
  const int first_query =
      static_cast<int>(tile % params.query_tiles) * Config::kQueries + warp % Config::kDqRowTiles * 32 + lane / 4;
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    float sums[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i] = from[(16 * strip + i) * 32];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int query = first_query + 16 * strip + 8 * row;
      T* to = static_cast<T*>(params.dq.data) + head / params.heads * params.dq.stride[0] +
              head % params.heads * params.dq.stride[1] + query * params.dq.stride[2] + first_column;
      store_row(to, sums, row, params.scale, query < params.query_count, params.dim - first_column);
    }
  }
}

}  // namespace adaattn::cuda::sm80
