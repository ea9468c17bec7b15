// From accumulators to global memory: rounds 16 rows and writes them in pieces of 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/common/ptx/arithmetic.cuh"

namespace adaattn::cuda::sm80 {

// Four lanes side by side hold word j of piece i in their register i, j being the lane; after it lane j holds piece j.
__device__ __forceinline__ uint4 transpose_quad(const std::uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  // Lanes 1 apart trade: the even one keeps pieces 0 and 2, the odd one 1 and 3.
  const std::uint32_t a = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[0] : words[1], 1);
  const std::uint32_t b = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[2] : words[3], 1);
  const std::uint32_t low0 = odd ? a : words[0], low1 = odd ? words[1] : a;
  const std::uint32_t high0 = odd ? b : words[2], high1 = odd ? words[3] : b;
  // Lanes 2 apart trade: the lower one keeps piece 0 or 1.
  const std::uint32_t c = __shfl_xor_sync(0xFFFFFFFFu, high ? low0 : high0, 2);
  const std::uint32_t d = __shfl_xor_sync(0xFFFFFFFFu, high ? low1 : high1, 2);
  return high ? make_uint4(c, d, high0, high1) : make_uint4(low0, low1, c, d);
}

// Row first_row + 8 row of a 16-row accumulator times factor, to the row that to points to; nothing if it does not
// exist.
template <typename T, int kCount>
__device__ __forceinline__ void store_row(T* to, const float (&values)[kCount], int row, float factor, bool exists,
                                          int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < kCount / 16; ++j) {  // 32 columns: one piece of 8 a lane
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (4 * j + i) + 2 * row;
      words[i] = ptx::pack<T>(values[at] * factor, values[at + 1] * factor);
    }
    const uint4 piece = transpose_quad(words, lane);
    const int column = 32 * j + 8 * (lane % 4);
    if (exists && column < dim) *reinterpret_cast<uint4*>(to + column) = piece;
  }
}

}  // namespace adaattn::cuda::sm80
