// Rounding to precisions that no CPU multiplies in, so that their results, not their speed, are the same as on GPUs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/dtype.h"

namespace adaattn::cpu {

inline bool is_emulated(std::int32_t precision) {
  return precision == ADAATTN_PRECISION_FLOAT16 || precision == ADAATTN_PRECISION_FLOAT8;
}

constexpr float kLargestFloat8 = 448;  // of e4m3: 4 exponent bits, 3 of mantissa, no infinities (arXiv 2209.05433)

// The nearest e4m3 value, ties to even; what is larger than the largest becomes that.
inline float round_to_float8(float value) {
  const float magnitude = std::min(std::abs(value), kLargestFloat8);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const float step = std::ldexp(1.0F, std::max(exponent - 4, -9));  // 2^-9: the subnormals' step
  return std::copysign(std::min(std::nearbyint(magnitude / step) * step, kLargestFloat8), value);
}

inline float round_to_float16(float value) { return float16_to_float(float_to_float16(value)); }

// Rounds count values that stand stride apart; float8 with one scale for all, the largest magnitude at 448.
inline void round_values(std::int32_t precision, float* values, std::size_t count, std::size_t stride) {
  if (precision == ADAATTN_PRECISION_FLOAT16) {
    for (std::size_t i = 0; i < count; ++i) values[i * stride] = round_to_float16(values[i * stride]);
    return;
  }
  float largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i * stride]));
  const float scale = largest / kLargestFloat8;
  for (std::size_t i = 0; i < count && scale > 0; ++i)
    values[i * stride] = round_to_float8(values[i * stride] / scale) * scale;
}

}  // namespace adaattn::cpu
