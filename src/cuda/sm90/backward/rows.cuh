// What the backward pass does once per query row: before the main kernel delta and lse, after it the rounding of dQ.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t two) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(two));
  else
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(two));
}

// 16 lanes a row: delta = rowsum(dO O) and lse / ln 2. A row that sees no key, or does not exist, gets +inf for its
// lse, which makes its probabilities 0.
template <typename T>
__global__ void prepare_rows_kernel(const RowParams params) {
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  const std::int64_t rows_per_head = static_cast<std::int64_t>(params.query_tiles) * params.tile_queries;
  const std::int64_t head = row / rows_per_head;
  if (head >= static_cast<std::int64_t>(params.batch) * params.heads) return;  // whole groups of 16 lanes
  const int query = static_cast<int>(row % rows_per_head);
  const std::int64_t b = head / params.heads, h = head % params.heads;
  float delta = 0.0f;
  if (query < params.query_count && lane * 8 < params.dim_v) {
    const auto load = [&](const void* data, const std::int64_t(&stride)[3]) {
      return *reinterpret_cast<const uint4*>(static_cast<const T*>(data) + b * stride[0] + h * stride[1] +
                                             query * stride[2] + lane * 8);
    };
    const uint4 out = load(params.out, params.out_stride), dout = load(params.dout, params.dout_stride);
    const std::uint32_t outs[4] = {out.x, out.y, out.z, out.w}, douts[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<T>(outs[i]), c = unpack<T>(douts[i]);
      delta = fmaf(a.y, c.y, fmaf(a.x, c.x, delta));
    }
  }
  const unsigned group = 0xFFFFu << (threadIdx.x % 32 / 16 * 16);
  for (int distance = 8; distance > 0; distance /= 2) delta += __shfl_xor_sync(group, delta, distance);
  if (lane != 0) return;
  float lse = INFINITY;
  if (query < params.query_count) {
    constexpr float kLog2e = 1.4426950408889634f;
    const float given = params.lse[head * params.query_count + query];
    if (given != -INFINITY) lse = given * kLog2e;
  }
  const std::int64_t tile = row / params.tile_queries;
  float* to = params.rows + tile * 2 * params.tile_queries + query % params.tile_queries;
  to[0] = lse;
  to[params.tile_queries] = delta;
}

// dq = scale * sums, from the order of the consumers' registers: a thread has 16 columns of two queries.
template <typename T, typename Config>
__global__ void finish_dq_kernel(const RowParams params) {
  // The index within a tile: consumer, 8 queries, warp, column of the quad; see QueryGradient and ptx/wgmma.cuh.
  constexpr int kEights = Config::kSharedQueries / 8, kPerTile = 2 * kEights * 16;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t tile = at / kPerTile, head = tile / params.query_tiles;
  if (head >= static_cast<std::int64_t>(params.batch) * params.heads) return;
  const int piece = static_cast<int>(at % kPerTile), column = piece % 4, warp = piece / 4 % 4;
  const int eight = piece / 16 % kEights, consumer = piece / 16 / kEights;

  const float4* from = reinterpret_cast<const float4*>(params.dq_sums) +
                       ((2 * tile + consumer) * kEights + eight) * 128 + 32 * warp + column;
  float4 parts[8];  // of each of 8 neighbouring columns, and 8 further on: two queries
#pragma unroll
  for (int i = 0; i < 8; ++i) parts[i] = from[4 * i];
  const int first_column = 64 * (Config::kChunks == 1 ? 0 : consumer) + 16 * warp;
  const int first_query = static_cast<int>(tile % params.query_tiles) * Config::kQueries + 8 * eight + 2 * column +
                          (Config::kChunks == 1 ? consumer * Config::kSharedQueries : 0);
  const std::int64_t b = head / params.heads, h = head % params.heads;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (first_query + i >= params.query_count) break;
    T* to = static_cast<T*>(params.dq) + b * params.dq_stride[0] + h * params.dq_stride[1] +
            (first_query + i) * params.dq_stride[2] + first_column;
    std::uint32_t words[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 &a = parts[2 * j], &c = parts[2 * j + 1];
      words[j] = pack<T>((i ? a.y : a.x) * params.scale, (i ? c.y : c.x) * params.scale);
      words[4 + j] = pack<T>((i ? a.w : a.z) * params.scale, (i ? c.w : c.z) * params.scale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (first_column + 8 * half < params.dim)
        reinterpret_cast<uint4*>(to)[half] =
            make_uint4(words[4 * half], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3]);
  }
}

}  // namespace adaattn::cuda::sm90
