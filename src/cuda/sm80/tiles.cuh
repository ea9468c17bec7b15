// Tiles of rows in shared memory: how they are copied there, and how warps read operands from them.
//
// Row r of a tile takes kDim elements; its 16-byte piece p lies at place p ^ (r % 8), so that the eight rows that one
// matrix of a load touches lie in different banks. kDim is a multiple of 64.
#pragma once

#include <cstdint>

#include "cuda/common/ptx/cp_async.cuh"
#include "cuda/common/ptx/ldmatrix.cuh"
#include "cuda/common/ptx/thread.cuh"

namespace adaattn::cuda::sm80 {

// Starts the copy of rows [first, first + kRows) of a [token, dim] matrix, whose row 0 from points to; rows at and
// after row_end and columns at and after dim become 0 and are not read.
template <int kRows, int kDim, int kThreads, typename T>
__device__ __forceinline__ void copy_tile(std::uint32_t to, const T* from, std::int64_t stride, int first, int row_end,
                                          int dim) {
  constexpr int kPieces = kDim / 8, kRowsAtOnce = kThreads / kPieces;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0,
                "a thread's pieces lie at the same place of their rows");
  const unsigned thread = ptx::fresh_thread_index(), piece = thread % kPieces, row = thread / kPieces;
  const int rows = static_cast<int>(piece) * 8 < dim ? row_end - first - static_cast<int>(row) : 0;  // from ours on
  const T* source = from + (first + static_cast<int>(row)) * stride + piece * 8;
  to += row * kDim * 2 + ((piece ^ (row % 8)) << 4);
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce, source += kRowsAtOnce * stride)
    ptx::copy_16_bytes(to + i * kDim * 2, i < rows ? source : from, i < rows);
}

// Where a lane's row of a 16 x 16 operand lies: four 8 x 8 matrices, of which the second is below the first (kBelow) or
// to its right.
template <int kDim, bool kBelow>
struct Operand {
  std::uint32_t base;

  __device__ __forceinline__ explicit Operand(std::uint32_t tile, unsigned thread = threadIdx.x) {
    const unsigned lane = thread % 32;
    const unsigned row = kBelow ? lane % 16 : lane % 8 + lane / 16 * 8, right = kBelow ? lane / 16 : lane / 8 % 2;
    base = tile + row * kDim * 2 + ((right ^ (row % 8)) << 4);
  }
  // Rows from 16 row_block on, columns from 16 column_block on.
  __device__ __forceinline__ std::uint32_t at(int row_block, int column_block) const {
    return (base ^ static_cast<std::uint32_t>(column_block % 4 * 32)) +
           static_cast<std::uint32_t>(column_block / 4 * 128 + row_block * 16 * kDim * 2);
  }
};

// a of a product, rows along the tile's rows; or b, k along the tile's rows, when loaded transposed.
template <int kDim>
using RowsFirst = Operand<kDim, true>;
// b of a product, n along the tile's rows; or a, k along the tile's rows, when loaded transposed.
template <int kDim>
using ColumnsFirst = Operand<kDim, false>;

}  // namespace adaattn::cuda::sm80
