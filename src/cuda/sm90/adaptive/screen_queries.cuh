// Queries as the screen's operand: q z rounded to e4m3, in registers.
#pragma once

#include <cstdint>

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

// Not 0 in bits 15 or 31 if one of two 16-bit numbers is NaN or infinite: its exponent, all ones, then carries.
template <typename T>
__device__ __forceinline__ std::uint32_t not_finite_bits(std::uint32_t two) {
  constexpr std::uint32_t kOne = std::is_same_v<T, __half> ? 0x0400'0400u : 0x0080'0080u;
  return (two & 0x7FFF'7FFFu) + kOne;
}

// a: the warp's 16 rows, which begin at the row rows points to, times z [kScreenRank][kDim], as wgmma_e4m3_rs wants
// them. norms: of the products' rows lane / 4 and 8 below, before rounding. Rows from count on are zeros. Returns
// whether one of the lane's numbers was not finite.
//
// The order of a sum's terms is free as long as both operands have the same: so that a lane may read 16 bytes at once,
// the columns 8 c to 8 c + 7 of 32 are those that lane c of four gives to two products of 16. And a product's columns
// are such rows of z that the sums of a lane are just the bytes that the next product expects of it.
template <typename T, int kDim>
__device__ __forceinline__ bool project_queries(std::uint32_t (&a)[4], float2& norms, const std::uint16_t* rows,
                                                std::int64_t stride, int count, int dim_qk, const std::uint16_t* z,
                                                int lane) {
  const int row = lane / 4, column = 8 * (lane % 4);
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  uint4 q[kDim / 32][2];
#pragma unroll
  for (int chunk = 0; chunk < kDim / 32; ++chunk)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = row + 8 * half < count && 32 * chunk + column < dim_qk;
      q[chunk][half] =
          exists ? __ldg(reinterpret_cast<const uint4*>(rows + (row + 8 * half) * stride + 32 * chunk + column))
                 : zeros;
    }
  float sums[4][4] = {};
  std::uint32_t bits = 0;
  const std::uint16_t* z_row = z + (4 * (row / 2) + row % 2) * kDim + column;
#pragma unroll
  for (int chunk = 0; chunk < kDim / 32; ++chunk) {
    const uint4 upper = q[chunk][0], lower = q[chunk][1];
    bits |= not_finite_bits<T>(upper.x) | not_finite_bits<T>(upper.y) | not_finite_bits<T>(upper.z) |
            not_finite_bits<T>(upper.w) | not_finite_bits<T>(lower.x) | not_finite_bits<T>(lower.y) |
            not_finite_bits<T>(lower.z) | not_finite_bits<T>(lower.w);
    const std::uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
    const std::uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const int tile_row = 16 * (tile / 2) + 2 * (tile % 2);
      const uint4 b = __ldg(reinterpret_cast<const uint4*>(z_row + tile_row * kDim + 32 * chunk));
      const std::uint32_t b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
      ptx::multiply_add<T>(sums[tile], first, b_first);
      ptx::multiply_add<T>(sums[tile], second, b_second);
    }
  }
  float squares[2] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) squares[i % 4 / 2] += sums[i / 4][i % 4] * sums[i / 4][i % 4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 1);
    squares[half] += __shfl_xor_sync(0xFFFFFFFFu, squares[half], 2);
  }
  norms = make_float2(sqrtf(squares[0]), sqrtf(squares[1]));
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower)
      a[2 * half + lower] = ptx::pack_e4m3(sums[2 * half][2 * lower], sums[2 * half][2 * lower + 1],
                                           sums[2 * half + 1][2 * lower], sums[2 * half + 1][2 * lower + 1]);
  return (bits & 0x8000'8000u) != 0;
}

}  // namespace adaattn::cuda::sm90
