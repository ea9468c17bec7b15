// Rows of 16-bit elements in shared memory, without padding, that ldmatrix reads and cp.async fills free of bank
// conflicts: the 16-byte pieces of a row change places with its index.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/ptx/ldmatrix.cuh"
#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

// Byte offset of the piece (8 elements) of a row in a tile of rows of kDim elements.
template <int kDim>
__device__ __forceinline__ std::uint32_t piece_offset(int row, int piece) {
  return static_cast<std::uint32_t>(row * (kDim * 2) + ((piece ^ (row & 7)) << 4));
}

// The same in a tile of kRows rows as the copy engine writes it: panels of 64 columns, swizzled over 128 bytes.
template <int kRows>
__device__ __forceinline__ std::uint32_t panel_offset(int row, int piece) {
  return static_cast<std::uint32_t>(piece / 8 * (kRows * 128) + row * 128 + ((piece % 8 ^ (row & 7)) << 4));
}

// ldmatrix addresses of a lane, as offsets in a tile. `piece` counts 8 columns, rows and columns are multiples of 8.
//
// Of a tile whose columns are k: 16 x 16 of operand a (rows m), four matrices in its order.
template <int kDim>
__device__ __forceinline__ std::uint32_t offset_a(int row, int piece, int lane) {
  return piece_offset<kDim>(row + lane % 16, piece + lane / 16);
}
// Two neighbours of operand b, 8 rows n each, 16 columns k: registers 0, 1 and 2, 3.
template <int kDim>
__device__ __forceinline__ std::uint32_t offset_b(int row, int piece, int lane) {
  return piece_offset<kDim>(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2);
}
// The same from a tile whose rows are k, loaded transposed: a (16 columns m, 16 rows k) ...
template <int kDim>
__device__ __forceinline__ std::uint32_t offset_a_transposed(int row, int piece, int lane) {
  return piece_offset<kDim>(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2);
}
// ... and two neighbours of b (8 columns n each, 16 rows k).
template <int kDim>
__device__ __forceinline__ std::uint32_t offset_b_transposed(int row, int piece, int lane) {
  return piece_offset<kDim>(row + lane % 16, piece + lane / 16);
}

// The rows of one head.
struct HeadRows {
  const std::uint16_t* data;
  std::int64_t stride;  // of tokens, in elements

  __device__ __forceinline__ HeadRows(const Rows16& rows, int batch, int head)
      : data(rows.data + batch * rows.stride[0] + head * rows.stride[1]), stride(rows.stride[2]) {}
  __device__ __forceinline__ const std::uint16_t* row(int token) const { return data + token * stride; }
};

// Rounded to 16 bits; float16's largest value stands for what lies beyond.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(fminf(fmaxf(x, -65504.0F), 65504.0F));
  else
    return __float2bfloat16_rn(x);
}

}  // namespace adaattn::cuda::sm90
