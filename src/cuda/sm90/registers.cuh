// What the forward and the backward kernels do with values in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/ptx/arithmetic.cuh"

namespace adaattn::cuda::sm90 {

using ptx::exp2_fast;
using ptx::max_nan;
using ptx::pack;

// An accumulator as the A operand of the next product: its layout is the operand's, two by two.
template <typename T, int kCount>
__device__ __forceinline__ void pack_operand(std::uint32_t (&packed)[kCount / 2], const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i] = pack<T>(values[2 * i], values[2 * i + 1]);
}

// The same as two 16-bit numbers an element: the words of what rounding left away come after all others.
template <typename T, int kCount>
__device__ __forceinline__ void pack_operand(std::uint32_t (&packed)[kCount], const float (&values)[kCount]) {
  static_assert(std::is_same_v<T, __nv_bfloat16>, "a bfloat16 is the upper half of a float32");
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float low = values[2 * i], high = values[2 * i + 1];
    const std::uint32_t both = pack<T>(low, high);
    packed[i] = both;
    packed[kCount / 2 + i] = pack<T>(low - __uint_as_float(both << 16), high - __uint_as_float(both & 0xFFFF0000u));
  }
}

// The four threads of a row add up what each has of it.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

// Four lanes side by side hold word j of piece j's four in register j each; after it lane j holds all of piece j.
__device__ __forceinline__ uint4 transpose_quad(const std::uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  // Lanes 1 apart trade: the even one keeps pieces 0 and 2, the odd one 1 and 3.
  const std::uint32_t a = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[0] : words[1], 1);
  const std::uint32_t b = __shfl_xor_sync(0xFFFFFFFFu, odd ? words[2] : words[3], 1);
  const std::uint32_t low0 = odd ? a : words[0], low1 = odd ? words[1] : a;    // two words of piece 0 or 1
  const std::uint32_t high0 = odd ? b : words[2], high1 = odd ? words[3] : b;  // two words of piece 2 or 3
  // Lanes 2 apart trade: the lower one keeps piece 0 or 1.
  const std::uint32_t c = __shfl_xor_sync(0xFFFFFFFFu, high ? low0 : high0, 2);
  const std::uint32_t d = __shfl_xor_sync(0xFFFFFFFFu, high ? low1 : high1, 2);
  return high ? make_uint4(c, d, high0, high1) : make_uint4(low0, low1, c, d);
}

// Two lanes side by side hold their words of two pieces of four words; after it the even one holds its two and the odd
// one's of the first piece, the odd one theirs of the second.
__device__ __forceinline__ uint2 trade_pair(std::uint32_t first, std::uint32_t second, int lane) {
  const bool odd = lane & 1;
  const std::uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
  return odd ? make_uint2(other, second) : make_uint2(first, other);
}

}  // namespace adaattn::cuda::sm90
