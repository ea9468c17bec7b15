// Keys that a row does not see must not reach it, not even as 0 * NaN: tiles with hidden keys and non-finite values of
// v take these plain loops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace adaattn::cpu {

inline bool is_finite_bits(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7F800000U) != 0x7F800000U;
}

// v with 0 in place of NaN and infinities; what lies between dim and width is 0.
inline const float* clean_copy(const float* v, std::size_t ld, std::size_t keys, std::size_t dim, float* to,
                               std::size_t width) {
  for (std::size_t key = 0; key < keys; ++key)
    for (std::size_t d = 0; d < width; ++d) {
      const float value = d < dim ? v[key * ld + d] : 0.0F;
      to[key * width + d] = is_finite_bits(value) ? value : 0.0F;
    }
  return to;
}

// A matrix of query rows by something, in either order.
template <typename T>
struct ByRow {
  T* data;
  std::size_t row_stride, other_stride;
  T& at(std::size_t row, std::size_t other) const { return data[row * row_stride + other * other_stride]; }
};

// out(row, d) += p(row, key) * v[key][d] over the non-finite v alone, where p is not 0.
inline void add_non_finite(const float* v, std::size_t ld, std::size_t keys, std::size_t dim, std::size_t rows,
                           ByRow<const float> p, ByRow<float> out) {
  for (std::size_t key = 0; key < keys; ++key)
    for (std::size_t d = 0; d < dim; ++d) {
      const float value = v[key * ld + d];
      if (is_finite_bits(value)) continue;
      for (std::size_t row = 0; row < rows; ++row)
        if (p.at(row, key) != 0) out.at(row, d) += p.at(row, key) * value;
    }
}

}  // namespace adaattn::cpu
