// Element types: their size, their name, and exact conversion of one scalar to and from float32.
#pragma once

#include <bit>
#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn {

constexpr std::int64_t dtype_size(std::int32_t dtype) {
  return dtype == ADAATTN_FLOAT32 ? 4 : dtype == ADAATTN_BOOL ? 1 : 2;
}

constexpr const char* dtype_name(std::int32_t dtype) {
  switch (dtype) {
    case ADAATTN_FLOAT32: return "float32";
    case ADAATTN_FLOAT16: return "float16";
    case ADAATTN_BFLOAT16: return "bfloat16";
    case ADAATTN_BOOL: return "bool";
    default: return "unknown";
  }
}

constexpr const char* device_name(std::int32_t device) {
  return device == ADAATTN_CPU ? "cpu" : device == ADAATTN_CUDA ? "cuda" : "unknown";
}

constexpr float bfloat16_to_float(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

// Round to nearest even; NaN stays NaN.
constexpr std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float float16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t rest = bits & 0x7FFFu;
  if (rest >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));
  if (rest < 0x400u) {  // subnormal: rest * 2^-24, exact in float32
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
}

// Round to nearest even; overflow becomes infinity, NaN stays NaN.
constexpr std::uint16_t float_to_float16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // rounds past 65,504
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the last bit with 2^-24, and the FPU rounds
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3F000000u));
  }
  const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float load_element(const void* data, std::int64_t index, std::int32_t dtype) {
  switch (dtype) {
    case ADAATTN_FLOAT32: return static_cast<const float*>(data)[index];
    case ADAATTN_FLOAT16: return float16_to_float(static_cast<const std::uint16_t*>(data)[index]);
    default: return bfloat16_to_float(static_cast<const std::uint16_t*>(data)[index]);
  }
}

inline void store_element(void* data, std::int64_t index, std::int32_t dtype, float value) {
  switch (dtype) {
    case ADAATTN_FLOAT32: static_cast<float*>(data)[index] = value; break;
    case ADAATTN_FLOAT16: static_cast<std::uint16_t*>(data)[index] = float_to_float16(value); break;
    default: static_cast<std::uint16_t*>(data)[index] = float_to_bfloat16(value);
  }
}

}  // namespace adaattn
