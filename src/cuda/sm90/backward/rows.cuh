// What the backward pass does once per query row: before the main kernel delta and lse, and, where the main kernel does
// not, the rounding of dQ after it.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/query_gradient.cuh"

namespace adaattn::cuda::sm90 {

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t two) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(two));
  else
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(two));
}

template <typename T>
__device__ __forceinline__ float dot_piece(const uint4& a, const uint4& b) {
  const std::uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(as[i]), y = unpack<T>(bs[i]);
    sum = fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
  }
  return sum;
}

// A lane takes 8 elements of each of four rows.
template <typename Config>
struct PrepareRows {
  static constexpr int kLanes = Config::kDim / 8, kRounds = 4, kRowsAtOnce = Config::kQueries / kRounds;
  static constexpr int kThreads = kRowsAtOnce * kLanes;
  static_assert(kThreads % 32 == 0, "all lanes of a warp add up rows");
};

// One tile of queries a block of threads: delta = rowsum(dO O) and lse / ln 2. A row that sees no
// key, or does not exist, gets +inf for its lse, which makes its probabilities 0. Zeroes the tile's sums for dQ, too,
// and the counters of its head. Last tiles first: the main kernel finds what it begins with in the L2 cache.
template <typename T, typename Config>
__global__ void __launch_bounds__(PrepareRows<Config>::kThreads, 3)
    prepare_rows_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = PrepareRows<Config>::kLanes, kRounds = PrepareRows<Config>::kRounds;
  constexpr int kRowsAtOnce = PrepareRows<Config>::kRowsAtOnce, kThreads = PrepareRows<Config>::kThreads;
  constexpr int kTileFloats = Config::kQueries * Config::kDim;
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int head = tile / params.query_tiles, b = head / params.heads, h = head % params.heads;
  const int row = thread / kLanes, lane = thread % kLanes;
  const int first_query = tile % params.query_tiles * Config::kQueries + row;

  if (params.adds) {
    float4* sums = reinterpret_cast<float4*>(params.sums + std::int64_t{tile} * kTileFloats) + thread;
#pragma unroll
    for (int i = 0; i < kTileFloats / 4 / kThreads; ++i) sums[i * kThreads] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  const auto place = [&](const void* data, const std::int64_t(&stride)[3]) {
    return static_cast<const T*>(data) + b * stride[0] + h * stride[1] + first_query * stride[2] + lane * 8;
  };
  const T* const from_out = place(params.out, params.out_stride);
  const T* const from_dout = place(params.dout, params.dout_stride);
  uint4 out[kRounds], dout[kRounds];
  float lse[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    out[i] = dout[i] = make_uint4(0, 0, 0, 0);
    lse[i] = -INFINITY;
    if (lane == 0 && first_query + i * kRowsAtOnce < params.query_count)
      lse[i] = params.lse[std::int64_t{head} * params.query_count + first_query + i * kRowsAtOnce];
    if (first_query + i * kRowsAtOnce < params.query_count && lane * 8 < params.dim_v) {
      out[i] = *reinterpret_cast<const uint4*>(from_out + i * kRowsAtOnce * params.out_stride[2]);
      dout[i] = *reinterpret_cast<const uint4*>(from_dout + i * kRowsAtOnce * params.dout_stride[2]);
    }
  }
  if (params.finished != nullptr && thread == 0 && tile % params.query_tiles == 0 && head % params.group == 0)
    params.finished[head / params.group] = 0;

  float* const to = params.rows + std::int64_t{tile} * 2 * Config::kQueries + row;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    float delta = dot_piece<T>(out[i], dout[i]);
    for (int distance = kLanes / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(0xFFFFFFFFu, delta, distance);
    if (lane != 0) continue;
    constexpr float kLog2e = 1.4426950408889634f;
    to[i * kRowsAtOnce] = lse[i] == -INFINITY ? INFINITY : lse[i] * kLog2e;
    to[i * kRowsAtOnce + Config::kQueries] = delta;
  }
}

// One tile a block of threads, last tiles first: those are in the L2 cache still.
template <typename T, typename Config>
__global__ void __launch_bounds__(DqPiece<T, Config>::kPerTile)
    finish_dq_kernel(const __grid_constant__ BackwardParams params) {
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  DqPiece<T, Config> piece;
  piece.load(params, tile, static_cast<int>(threadIdx.x));
  piece.store(params, tile, static_cast<int>(threadIdx.x));
}

}  // namespace adaattn::cuda::sm90
