// What measure makes of a block of keys apart from the probe rows: screened keys and means of values, both by the
// tensor cores from the tiles in shared memory, which are in panels (panel_offset).
#pragma once

#include <cfloat>
#include <cstdint>

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/sm90/adaptive/tile16.cuh"

namespace adaattn::cuda::sm90 {

// k y - y_means of 16 keys, in k8's order from the block's first byte on. Returns whether k y is finite. means:
// y_means, in global memory.
template <int kDim, typename T>
__device__ __forceinline__ bool screen_keys(std::uint32_t k, std::uint32_t y, const float* means, int first,
                                            int existing, int lane, std::uint8_t* block) {
  float sums[4][4] = {};
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    std::uint32_t a[4];
    ptx::load_matrices(a, k + panel_offset<kBlockKeys>(first + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      std::uint32_t b[4];
      ptx::load_matrices(b, y + offset_b<kDim>(pair * 16, step * 2, lane));
      ptx::multiply_add<T>(sums[pair * 2], a, b);
      ptx::multiply_add<T>(sums[pair * 2 + 1], a, b + 2);
    }
  }
  bool finite = true;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int rows = 0; rows < 2; ++rows) {
    const int key = first + rows * 8 + lane / 4;
    std::uint32_t pairs[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float low = sums[t][rows * 2], high = sums[t][rows * 2 + 1];
      finite = finite && fabsf(low) <= FLT_MAX && fabsf(high) <= FLT_MAX;
      const float2 mean = __ldg(reinterpret_cast<const float2*>(means + t * 8 + lane % 4 * 2));
      pairs[t] = key < existing ? ptx::pack_e4m3(low - mean.x, high - mean.y) : 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // even lanes get four ranks of tile 2 half, odd ones of the next
      const std::uint32_t kept = odd ? pairs[half * 2 + 1] : pairs[half * 2];
      const std::uint32_t got = __shfl_xor_sync(0xFFFFFFFFU, odd ? pairs[half * 2] : pairs[half * 2 + 1], 1);
      const int byte = half * 2048 + key / 8 * 128 + key % 8 * 16 + (odd ? 8 : 0) + lane % 4 / 2 * 4;
      *reinterpret_cast<std::uint32_t*>(block + byte) = odd ? got | kept << 16 : kept | got << 16;
    }
  }
  return finite;
}

// Means of 16 columns of v from `column` on over the block's keys that exist; the others are zeros in the tile. Returns
// whether they are finite.
template <int kDim, typename T>
__device__ __forceinline__ bool mean_values(std::uint32_t v, int column, int existing, int lane, float* means) {
  const std::uint32_t one = ptx::pack<T>(1, 1), ones[4] = {one, one, one, one};
  float sums[2][4] = {};
#pragma unroll
  for (int row = 0; row < kBlockKeys; row += 16) {
    std::uint32_t b[4];
    ptx::load_matrices_transposed(b, v + panel_offset<kBlockKeys>(row + lane % 16, column / 8 + lane / 16));
    ptx::multiply_add<T>(sums[0], ones, b);
    ptx::multiply_add<T>(sums[1], ones, b + 2);
  }
  const float factor = 1.0F / static_cast<float>(existing);
  if (lane < 4)
#pragma unroll
    for (int t = 0; t < 2; ++t)
      *reinterpret_cast<float2*>(means + column + t * 8 + lane * 2) = {sums[t][0] * factor, sums[t][1] * factor};
  return fabsf(sums[0][0]) <= FLT_MAX && fabsf(sums[0][1]) <= FLT_MAX && fabsf(sums[1][0]) <= FLT_MAX &&
         fabsf(sums[1][1]) <= FLT_MAX;
}

}  // namespace adaattn::cuda::sm90
