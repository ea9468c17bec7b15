// From exact sums of bytes to probabilities in bfloat16, relative to a reference that is known (config.h).
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "cuda/sm90/int8/config.h"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

// What turns a tile's sums into exponents, of a thread's two rows.
struct RowFactors {
  float factor[2];               // sum * factor - reference: for powers by the special-function unit
  int multiplier[2], addend[2];  // sum * multiplier + addend: for powers by products
};

// Powers by products, after Schraudolph (1999, Neural Computation 11): the upper half of sum * multiplier + addend is
// the exponent in units of 1/128, offset by bfloat16's 127: the bits of a bfloat16 that is right at powers of two and
// up to 6 % too large between. Its sum with the same half an octave on, times 2^-1/2, has half the harmonics: 0.48 %
// root mean square once their mean is taken out. Exponents must not be below -124.
constexpr std::uint32_t kHalfOctave = 0x00400040u, kBackAgain = 0x3F333F33u;  // 64 / 128, and 0.69921875 twice
constexpr float kTooLarge = 133.82f;  // the mean of the sum, in the units above: 128 log2 of about 2.06
constexpr float kMostByProducts = 91.0f - kMostExponent;  // reference up to which no exponent leaves -122 .. 60

// What does not depend on the tile of keys.
__device__ __forceinline__ int fixed_addend(float reference) {
  return __float2int_rn(fmaf(-reference, 8388608.0f, (127.0f * 128.0f - kTooLarge) * 65536.0f));
}

__device__ __forceinline__ RowFactors row_factors(const float (&scale)[2], const int (&addend)[2], float tile_scale) {
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the rounded integer
  RowFactors f;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    f.factor[row] = scale[row] * tile_scale;
    // factor * 2^23, at most 2^21
    f.multiplier[row] = __float_as_int(fmaf(f.factor[row], 8388608.0f, kRounds)) - __float_as_int(kRounds);
    f.addend[row] = addend[row];
  }
  return f;
}

// In place: sums become powers, packed two by two and not yet finished.
template <int kCount>
__device__ __forceinline__ void start_powers(int (&sums)[kCount], const RowFactors& f) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const int row = i / 2 % 2;
    const int low = sums[i] * f.multiplier[row] + f.addend[row], high = sums[i + 1] * f.multiplier[row] + f.addend[row];
    sums[i] = static_cast<int>(__byte_perm(low, high, 0x7632));
    sums[i + 1] = sums[i] + static_cast<int>(kHalfOctave);
  }
}

// The powers as the A operand of the product with V.
template <int kCount>
__device__ __forceinline__ void finish_powers(std::uint32_t (&p)[kCount / 2], const int (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(p[i]) : "r"(sums[2 * i + 1]), "r"(kBackAgain), "r"(sums[2 * i]));
}

// In place: sums become powers by the special-function unit, as floats; hidden ones 0.
template <int kCount>
__device__ __forceinline__ void exponentiate_and_hide(int (&sums)[kCount], const RowFactors& f,
                                                      const float (&reference)[2], bool left_limited,
                                                      const HiddenKeys (&hidden)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = i / 2 % 2, key = 8 * (i / 4) + i % 2;
    const float power = exp2_fast(fmaf(static_cast<float>(sums[i]), f.factor[row], -reference[row]));
    sums[i] = key >= hidden[row].end ? 0 : __float_as_int(power);
  }
  if (!left_limited) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = i / 2 % 2, key = 8 * (i / 4) + i % 2;
    if (key < hidden[row].begin && key >= hidden[row].sink_end) sums[i] = 0;
  }
}

template <int kCount>
__device__ __forceinline__ void pack_powers(std::uint32_t (&p)[kCount / 2], const int (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i)
    p[i] = pack<__nv_bfloat16>(__int_as_float(sums[2 * i]), __int_as_float(sums[2 * i + 1]));
}

// The largest sum that each row sees among this thread's; INT_MIN where it sees none.
template <int kCount>
__device__ __forceinline__ void largest_sums(const int (&sums)[kCount], const HiddenKeys (&hidden)[2], int (&tops)[2]) {
  tops[0] = tops[1] = INT_MIN;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = i / 2 % 2, key = 8 * (i / 4) + i % 2;
    if (key < hidden[row].end && (key >= hidden[row].begin || key < hidden[row].sink_end))
      tops[row] = max(tops[row], sums[i]);
  }
}

// Whether a row that sees a key came out wrong: what it sums is so small that powers which underflowed may count (2^24
// of below 2^-126 are at most 2^-12 of the sum), or products overflowed.
template <int kOutputs>
__device__ __forceinline__ bool row_failed(const float (&out)[kOutputs], int row) {
  constexpr float kLeast = 0x1p-90f;
  float probe = 0.0f;  // NaN where out is not finite
#pragma unroll
  for (int i = 0; i < kOutputs / 2; ++i) probe = fmaf(out[4 * (i / 2) + 2 * row + i % 2], 0.0f, probe);
  return !(out[kOutputs - 4 + 2 * row] >= kLeast) || probe != 0.0f;
}

}  // namespace adaattn::cuda::sm90
