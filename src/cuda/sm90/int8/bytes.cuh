// Eight 16-bit elements as floats, and floats as bytes.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

struct Eight {
  float value[8];
};

__device__ __forceinline__ Eight load_eight(const std::uint16_t* from, bool bfloat16) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
  Eight result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bfloat16) {
      result.value[2 * i] = __uint_as_float(word[i] << 16);
      result.value[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
    } else {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(word[i]));
      result.value[2 * i] = both.x, result.value[2 * i + 1] = both.y;
    }
  }
  return result;
}

// Magnitudes as integers: NaN is above all.
__device__ __forceinline__ unsigned magnitude(float value) { return __float_as_uint(value) & 0x7FFFFFFFu; }

// The scale that brings a largest magnitude to 127; never 0, NaN if the magnitude is not finite.
__device__ __forceinline__ float scale_of_magnitude(unsigned largest) {
  constexpr float kLeast = 0x1p-66f;  // so that zeros have a scale, too, and products of scales stay in range
  const float value = __uint_as_float(largest);
  if (!(value <= 3.4028235e38f)) return __int_as_float(0x7FFFFFFF);
  return fmaxf(value * (1.0f / 127.0f), kLeast);
}

// The lowest bytes of four floats, a's lowest.
__device__ __forceinline__ std::uint32_t low_bytes(float a, float b, float c, float d) {
  return __byte_perm(__byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040),
                     __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040), 0x5410);
}

}  // namespace adaattn::cuda::sm90
