// What the float32 kernels on ordinary cores share: rows from global to shared memory, and sums over a warp.
#pragma once

#include "cuda/simt/launch.h"

namespace adaattn::cuda::simt {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAll, value, distance);
  return value;
}

// Rows [first, end) of one head, zeros after them and past the last column.
template <int kRows, int kStride>
__device__ __forceinline__ void load_rows(float (&to)[kRows][kStride], const TensorView& view, int batch, int head,
                                          int first, int end, int dim, int padded_dim) {
  const float* from = view.data + batch * view.stride[0] + head * view.stride[1];
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kWarps)
    for (int column = static_cast<int>(threadIdx.x) % 32; column < padded_dim; column += 32)
      to[row][column] =
          first + row < end && column < dim ? from[(first + row) * view.stride[2] + column * view.stride[3]] : 0.0f;
}

// sums[r] += row first_row + r of a times this lane's row of b, of which dim columns count, a multiple of 4.
template <int kCount, int kRowsOfA, int kStrideOfA, int kRowsOfB, int kStrideOfB>
__device__ __forceinline__ void add_products(float (&sums)[kCount], const float (&a)[kRowsOfA][kStrideOfA],
                                             int first_row, const float (&b)[kRowsOfB][kStrideOfB], int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int d = 0; d < dim; d += 4) {
    const float4 right = *reinterpret_cast<const float4*>(&b[lane][d]);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float4 left = *reinterpret_cast<const float4*>(&a[first_row + r][d]);
      sums[r] = fmaf(left.x, right.x, fmaf(left.y, right.y, fmaf(left.z, right.z, fmaf(left.w, right.w, sums[r]))));
    }
  }
}

}  // namespace adaattn::cuda::simt
