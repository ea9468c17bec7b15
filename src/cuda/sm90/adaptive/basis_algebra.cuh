// Dense algebra of one thread block for the screen's basis: products with a gram matrix that lies in registers, and
// orthonormal rows under it.
//
// Numbers are float32, split into two bfloat16 (high and low, 16 bits of mantissa in all) for the tensor cores:
// a b = a_high b_high + a_high b_low + a_low b_high.
#pragma once

#include <cstdint>

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/common/ptx/ldmatrix.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/common/ptx/reduce.cuh"
#include "cuda/sm90/adaptive/tile16.cuh"

namespace adaattn::cuda::sm90 {

// 16 rows of a symmetric matrix [kDim, kDim], the share of one warp, as operand a.
template <int kDim>
struct GramRows {
  std::uint32_t high[kDim / 16][4], low[kDim / 16][4];
};

__device__ __forceinline__ void split_pair(float x, float y, std::uint32_t& high, std::uint32_t& low) {
  high = ptx::pack<__nv_bfloat16>(x, y);
  low = ptx::pack<__nv_bfloat16>(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xFFFF0000U));
}
__device__ __forceinline__ float low_half(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(std::uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000U); }

// A matrix [kScreenRank, kDim]: split, in tiles of tile16.cuh, and as it is.
template <int kDim>
struct RankRows {
  static constexpr int kStride = kDim + 4;  // 2 rows on are 8 banks on: accumulators are stored free of conflicts
  alignas(128) std::uint16_t high[kScreenRank * kDim], low[kScreenRank * kDim];
  float exact[kScreenRank * kStride];

  __device__ __forceinline__ void set_split(int rank, int dim, float x) {
    const __nv_bfloat16 above = __float2bfloat16_rn(x);
    const std::uint32_t at = piece_offset<kDim>(rank, dim / 8) / 2 + static_cast<std::uint32_t>(dim % 8);
    high[at] = __bfloat16_as_ushort(above);
    low[at] = __bfloat16_as_ushort(__float2bfloat16_rn(x - __bfloat162float(above)));
  }
};

// sums[t][.] = (gram x^T), the warp's 16 rows, columns 8 t on: accumulators of mma.cuh.
template <int kDim>
__device__ __forceinline__ void multiply(const GramRows<kDim>& gram, const RankRows<kDim>& x, int lane,
                                         float (&sums)[4][4]) {
  const std::uint32_t high = ptx::shared_address(x.high), low = ptx::shared_address(x.low);
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[t][e] = 0;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    std::uint32_t b_high[2][4], b_low[2][4];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const std::uint32_t at = offset_b<kDim>(pair * 16, step * 2, lane);
      ptx::load_matrices(b_high[pair], high + at);
      ptx::load_matrices(b_low[pair], low + at);
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) ptx::multiply_add<__nv_bfloat16>(sums[t], gram.low[step], &b_high[t / 2][t % 2 * 2]);
#pragma unroll
    for (int t = 0; t < 4; ++t) ptx::multiply_add<__nv_bfloat16>(sums[t], gram.high[step], &b_low[t / 2][t % 2 * 2]);
#pragma unroll
    for (int t = 0; t < 4; ++t) ptx::multiply_add<__nv_bfloat16>(sums[t], gram.high[step], &b_high[t / 2][t % 2 * 2]);
  }
}

// to = the transpose of all warps' sums. A barrier must follow.
template <int kDim>
__device__ __forceinline__ void store(const float (&sums)[4][4], int warp, int lane, RankRows<kDim>& to) {
  std::uint32_t high[8], low[8];  // [t][rows g or g + 8]
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      split_pair(sums[t][half * 2], sums[t][half * 2 + 1], high[t * 2 + half], low[t * 2 + half]);
      float* exact = to.exact + (t * 8 + lane % 4 * 2) * RankRows<kDim>::kStride + warp * 16 + half * 8 + lane / 4;
      exact[0] = sums[t][half * 2];
      exact[RankRows<kDim>::kStride] = sums[t][half * 2 + 1];
    }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // matrices: t, rows g; t, rows g + 8; t + 1, rows g; ...
    const std::uint32_t at = piece_offset<kDim>(pair * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
    ptx::store_transposed(ptx::shared_address(to.high) + at, high + pair * 4);
    ptx::store_transposed(ptx::shared_address(to.low) + at, low + pair * 4);
  }
}

// products = y t^T [kScreenRank][kScreenRank], by all warps. A barrier must follow.
template <int kDim>
__device__ __forceinline__ void multiply_rows(const RankRows<kDim>& y, const RankRows<kDim>& t, int warp, int lane,
                                              float* products) {
  const std::uint32_t y_high = ptx::shared_address(y.high), y_low = ptx::shared_address(y.low);
  const std::uint32_t t_high = ptx::shared_address(t.high), t_low = ptx::shared_address(t.low);
#pragma unroll
  for (int tile = warp; tile < 8; tile += kDim / 16) {
    const int row = tile / 4 * 16, column = tile % 4 * 8;
    float sums[3][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 16; step += 2) {
      std::uint32_t b_high[4], b_low[4];  // of two steps
      const std::uint32_t b = piece_offset<kDim>(column + lane % 8, step * 2 + lane / 8);
      ptx::load_matrices(b_high, t_high + b);
      ptx::load_matrices(b_low, t_low + b);
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        std::uint32_t a_high[4], a_low[4];
        const std::uint32_t a = offset_a<kDim>(row, (step + next) * 2, lane);
        ptx::load_matrices(a_high, y_high + a);
        ptx::load_matrices(a_low, y_low + a);
        ptx::multiply_add<__nv_bfloat16>(sums[0], a_high, b_high + next * 2);
        ptx::multiply_add<__nv_bfloat16>(sums[1], a_high, b_low + next * 2);
        ptx::multiply_add<__nv_bfloat16>(sums[2], a_low, b_high + next * 2);
      }
    }
    float* to = products + (row + lane / 4) * kScreenRank + column + lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e / 2 * 8 * kScreenRank + e % 2] = sums[0][e] + (sums[1][e] + sums[2][e]);
  }
}

// The factor L of a symmetric matrix L L^T.
struct Factor {
  alignas(16) float columns[kScreenRank][kScreenRank];  // [j][i] = L[i][j], i > j
  float inverse[kScreenRank];                           // 1 / L[j][j]
};

// Cholesky's, by one warp; lane i holds row i. A row of which less than `least` of its square is new takes no part:
// only made longer, so that the next iteration finds what is new in it, or 0 the last time.
__device__ __forceinline__ void factorize(const float* matrix, float least, bool last, int lane, Factor& to) {
  float row[kScreenRank];
#pragma unroll
  for (int j = 0; j < kScreenRank; ++j) row[j] = matrix[j * kScreenRank + lane];  // symmetric
  float rest = matrix[lane * kScreenRank + lane];                                 // of the diagonal
  const float limit = fmaxf(least * rest, 1e-30F);
#pragma unroll
  for (int j = 0; j < kScreenRank; ++j) {
    const float pivot = __shfl_sync(0xFFFFFFFFU, rest, j), least_pivot = __shfl_sync(0xFFFFFFFFU, limit, j);
    const bool is_new = pivot > least_pivot;
    const float inverse = is_new ? rsqrtf(pivot) : last ? 0.0F : rsqrtf(least_pivot);
    const float below = is_new && lane > j ? row[j] * inverse : 0.0F;
    rest -= below * below;
#pragma unroll
    for (int i = j + 1; i < kScreenRank; ++i) row[i] -= below * __shfl_sync(0xFFFFFFFFU, below, i);
    to.columns[j][lane] = below;
    if (lane == j) to.inverse[j] = inverse;
  }
}

// Column `dim` of L^-1 x, by one thread.
template <int kDim>
__device__ __forceinline__ void solve(const Factor& factor, const RankRows<kDim>& x, int dim,
                                      float (&column)[kScreenRank]) {
#pragma unroll
  for (int j = 0; j < kScreenRank; ++j) column[j] = x.exact[j * RankRows<kDim>::kStride + dim];
#pragma unroll
  for (int i = 0; i < kScreenRank; ++i) {
    column[i] *= factor.inverse[i];
#pragma unroll
    for (int j = (i + 1) / 4 * 4; j < kScreenRank; j += 4) {
      const float4 below = *reinterpret_cast<const float4*>(&factor.columns[i][j]);
      if (j > i) column[j] -= below.x * column[i];
      if (j + 1 > i) column[j + 1] -= below.y * column[i];
      if (j + 2 > i) column[j + 2] -= below.z * column[i];
      column[j + 3] -= below.w * column[i];
    }
  }
}

}  // namespace adaattn::cuda::sm90
