// What the backward pass does once per query row: delta and lse before the main kernel, the rounding of dQ after it.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/registers.cuh"

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
// key, or does not exist, gets +inf for its lse, which makes its probabilities 0. Zeroes the tile's sums for dQ, too.
// Last tiles first: the main kernel finds what it begins with in the L2 cache.
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

// A thread's part of the rounding of one tile: dq = scale * sums of 16 columns of two queries.
template <typename T, typename Config>
struct DqPiece {
  static constexpr int kEights = Config::kSharedQueries / 8, kPerTile = 2 * kEights * 16;
  float4 parts[8];  // of each of 8 neighbouring columns, and 8 further on: two queries

  // The index within a tile: consumer, 8 queries, warp, column of the quad; see stage_dq and ptx/wgmma.cuh.
  static __device__ __forceinline__ int column(int piece) { return piece % 4; }
  static __device__ __forceinline__ int warp(int piece) { return piece / 4 % 4; }
  static __device__ __forceinline__ int eight(int piece) { return piece / 16 % kEights; }
  static __device__ __forceinline__ int consumer(int piece) { return piece / 16 / kEights; }

  // The tile of all heads' tiles.
  __device__ __forceinline__ void load(const BackwardParams& params, int tile, int piece) {
    const float4* from = reinterpret_cast<const float4*>(params.sums) +
                         ((2 * std::int64_t{tile} + consumer(piece)) * kEights + eight(piece)) * 128 +
                         32 * warp(piece) + column(piece);
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[i] = __ldcg(from + 4 * i);
  }

  __device__ __forceinline__ void store(const BackwardParams& params, int tile, int piece) const {
    const int head = tile / params.query_tiles, b = head / params.heads, h = head % params.heads;
    const int first_column = 64 * (Config::kChunks == 1 ? 0 : consumer(piece)) + 16 * warp(piece);
    const int first_query = tile % params.query_tiles * Config::kQueries + 8 * eight(piece) + 2 * column(piece) +
                            (Config::kChunks == 1 ? consumer(piece) * Config::kSharedQueries : 0);
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
};

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
