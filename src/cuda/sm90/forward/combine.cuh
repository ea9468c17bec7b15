// Puts the parts of tiles together: out = sum_i 2^(lse_i - lse) out_i, in the order of the parts, so that the same call
// always rounds the same way.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/row_result.cuh"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/forward/split.h"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

constexpr int kCombineWarps = 4;

// Rows of a tile that can exist: heads are fastest, so rows of queries past the last come last.
template <typename Config>
constexpr int combined_rows(const TileGrid& grid) {
  return Config::kPacks ? least(grid.pack_tokens, grid.query_count) * grid.pack_heads : Config::kQueries;
}

template <typename Sum>
__device__ __forceinline__ float warp_reduce(float value, const Sum& sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = sum(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  return value;
}

// One block of threads a row; warps take every fourth part. A part without keys has not written its output.
template <typename T, typename Config>
__global__ void __launch_bounds__(32 * kCombineWarps) combine_kernel(const __grid_constant__ ForwardParams params) {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");  // launched while the parts are still at work
  const TileGrid& grid = params.grid;
  const int rows = combined_rows<Config>(grid), row = static_cast<int>(blockIdx.x) % rows;
  const TilePlan plan =
      place_of_item<Config>(grid, grid.whole_tiles + static_cast<int>(blockIdx.x) / rows * grid.parts);
  const RowPlace place = place_of_row<Config>(grid, plan, row);
  if (!place.exists) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t first_slot = static_cast<std::int64_t>(plan.part) * Config::kQueries + row;
  constexpr int kLaneParts = kMostParts / 32;
  RowResult parts[kLaneParts];
#pragma unroll
  for (int i = 0; i < kLaneParts; ++i) {
    const int part = lane + 32 * i;
    parts[i] =
        part < grid.parts ? params.part_rows[first_slot + part * Config::kQueries] : RowResult{.lse_log2 = -INFINITY};
  }
  const auto max_of = [](float a, float b) { return max_nan(a, b); };
  const auto sum_of = [](float a, float b) { return a + b; };
  float top = -INFINITY;
#pragma unroll
  for (const RowResult& part : parts) top = max_nan(top, part.lse_log2);
  top = warp_reduce(top, max_of);
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f, weights[kLaneParts];
#pragma unroll
  for (int i = 0; i < kLaneParts; ++i) sum += weights[i] = exp2_fast(parts[i].lse_log2 - base);
  sum = warp_reduce(sum, sum_of);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  RowResult whole{.lse_log2 = sum == 0.0f ? -INFINITY : base + log2f(sum)};
#pragma unroll
  for (float& weight : weights) weight *= inverse;

  float4 totals[2] = {};  // columns 4 lane and 128 + 4 lane
  for (int part = warp; part < grid.parts; part += kCombineWarps) {
    float weight = weights[0], lse = parts[0].lse_log2;
#pragma unroll
    for (int i = 1; i < kLaneParts; ++i)
      if (part / 32 == i) weight = weights[i], lse = parts[i].lse_log2;
    weight = __shfl_sync(0xFFFFFFFFu, weight, part % 32), lse = __shfl_sync(0xFFFFFFFFu, lse, part % 32);
    if (lse == -INFINITY) continue;
    const float* from = params.part_out + (first_slot + part * Config::kQueries) * params.dim_v;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = 128 * half + 4 * lane;
      if (column >= params.dim_v) continue;
      const float4 values = *reinterpret_cast<const float4*>(from + column);
      totals[half].x = fmaf(weight, values.x, totals[half].x);
      totals[half].y = fmaf(weight, values.y, totals[half].y);
      totals[half].z = fmaf(weight, values.z, totals[half].z);
      totals[half].w = fmaf(weight, values.w, totals[half].w);
    }
  }
  __shared__ float4 of_warps[kCombineWarps][2][32];
  of_warps[warp][0][lane] = totals[0], of_warps[warp][1][lane] = totals[1];
  __syncthreads();
  if (const int column = 128 * warp + 4 * lane; warp < 2 && column < params.dim_v) {
    float4 total = of_warps[0][warp][lane];
#pragma unroll
    for (int other = 1; other < kCombineWarps; ++other) {
      const float4 more = of_warps[other][warp][lane];
      total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    T* to = static_cast<T*>(params.out) + plan.batch * params.out_stride[0] + place.head * params.out_stride[1] +
            place.query * params.out_stride[2];
    *reinterpret_cast<uint2*>(to + column) = make_uint2(pack<T>(total.x, total.y), pack<T>(total.z, total.w));
  }
  if (warp != 0) return;
  if constexpr (Config::kMasks) {
    // A row's -log p in the whole is that in its part plus how much more the whole's sum is.
    float entropy = 0.0f, largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneParts; ++i) {
      if (parts[i].lse_log2 == -INFINITY) continue;
      entropy = fmaf(weights[i], parts[i].entropy + kLn2 * (whole.lse_log2 - parts[i].lse_log2), entropy);
      largest = max_nan(largest, weights[i] * parts[i].max_probability);
    }
    whole.entropy = warp_reduce(entropy, sum_of);
    whole.max_probability = warp_reduce(largest, max_of);
  }
  if (lane == 0) store_row_result<Config::kMasks>(params, plan.batch, place, whole);
}

}  // namespace adaattn::cuda::sm90
