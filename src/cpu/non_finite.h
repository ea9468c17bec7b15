// Keys that a row does not see must not reach it, not even as 0 * NaN: tiles with hidden keys and non-finite values of
// v take these plain loops.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace adaattn::cpu {

inline bool is_finite_bits(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7F800000U) != 0x7F800000U;
}

inline bool all_finite(const float* v, std::size_t ld, std::size_t keys, std::size_t dim) {
  for (std::size_t key = 0; key < keys; ++key) {
    std::uint32_t bad = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, v + key * ld + d, sizeof bits);
      bad |= static_cast<std::uint32_t>((bits & 0x7F800000U) == 0x7F800000U);
    }
    if (bad != 0) return false;
  }
  return true;
}

// v with 0 in place of NaN and infinities, [keys][dim].
inline const float* clean_copy(const float* v, std::size_t ld, std::size_t keys, std::size_t dim, float* to) {
  for (std::size_t key = 0; key < keys; ++key)
    for (std::size_t d = 0; d < dim; ++d) {
      const float value = v[key * ld + d];
      to[key * dim + d] = is_finite_bits(value) ? value : 0.0F;
    }
  return to;
}

// out[d][lane] += p[key][lane] * v[key][d] over the non-finite v alone, where p is not 0.
inline void add_non_finite(const float* v, std::size_t ld, std::size_t keys, std::size_t dim, const float* p,
                           std::size_t lanes, float* out) {
  for (std::size_t key = 0; key < keys; ++key)
    for (std::size_t d = 0; d < dim; ++d) {
      const float value = v[key * ld + d];
      if (is_finite_bits(value)) continue;
      for (std::size_t lane = 0; lane < lanes; ++lane)
        if (p[key * lanes + lane] != 0) out[d * lanes + lane] += p[key * lanes + lane] * value;
    }
}

}  // namespace adaattn::cpu
