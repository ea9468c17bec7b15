// The five matrix products of the backward pass, each from shared memory, a warp's tile at a time.
#pragma once

#include <cstdint>

#include "cuda/common/ptx/mma.cuh"
#include "cuda/sm80/tiles.cuh"

namespace adaattn::cuda::sm80 {

// How an operand's 16 x 16 pieces are read; index is along the result's rows or columns, depth along what is summed.
template <int kDim>
struct RowsOfLeft {  // rows along the tile's rows
  RowsFirst<kDim> tile;
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int index, int depth) const {
    ptx::load_matrices(to, tile.at(index, depth));
  }
};
template <int kDim>
struct ColumnsOfLeft {  // rows along the tile's columns
  ColumnsFirst<kDim> tile;
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int index, int depth) const {
    ptx::load_matrices_transposed(to, tile.at(depth, index));
  }
};
template <int kDim>
struct RowsOfRight {  // columns along the tile's rows
  ColumnsFirst<kDim> tile;
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int index, int depth) const {
    ptx::load_matrices(to, tile.at(index, depth));
  }
};
template <int kDim>
struct ColumnsOfRight {  // columns along the tile's columns
  RowsFirst<kDim> tile;
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int index, int depth) const {
    ptx::load_matrices_transposed(to, tile.at(depth, index));
  }
};

// sums += left right; left_index and right_index: where the warp's tile of the result begins, in pieces of 16.
template <typename T, int kDepth, int kStrips, int kCount, typename Left, typename Right>
__device__ __forceinline__ void multiply(float (&sums)[kStrips][kCount], const Left& left, int left_index,
                                         const Right& right, int right_index) {
#pragma unroll
  for (int depth = 0; depth < kDepth / 16; ++depth) {
    std::uint32_t a[kStrips][4];
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) left.load(a[strip], left_index + strip, depth);
#pragma unroll
    for (int j = 0; j < kCount / 8; ++j) {
      std::uint32_t b[4];
      right.load(b, right_index + j, depth);
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        ptx::multiply_add<T>(sums[strip] + 8 * j, a[strip], b);
        ptx::multiply_add<T>(sums[strip] + 8 * j + 4, a[strip], b + 2);
      }
    }
  }
}

template <int kStrips, int kCount>
__device__ __forceinline__ void clear(float (&sums)[kStrips][kCount]) {
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
    for (float& value : sums[strip]) value = 0.0f;
}

}  // namespace adaattn::cuda::sm80
