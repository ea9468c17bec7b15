// The mask's entries for one row of queries.
#pragma once

#include <cstdint>
#include <limits>

#include "adaattn/adaattn.h"
#include "common/tensor.h"

namespace adaattn::cpu {

struct MaskRow {
  const void* data;  // entry of the first key
  std::int32_t dtype;
  std::int64_t key_stride;  // in elements
};

inline MaskRow mask_row(const adaattn_tensor& mask, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t key) {
  const std::int64_t at = broadcast_offset_of(mask, b, h, i, key) * dtype_size(mask.dtype);
  return {.data = static_cast<const std::byte*>(mask.data) + at,
          .dtype = mask.dtype,
          .key_stride = mask.shape[3] == 1 ? 0 : mask.stride[3]};
}

// Finite terms are kept above this, so that the change of the logarithm's base cannot overflow them.
constexpr float kLowestTerm = std::numeric_limits<float>::lowest() / 2;

// 0 or the additive mask's value where the mask shows the key, -inf where it hides it.
inline float mask_term(const MaskRow& row, std::int64_t key) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  if (row.dtype == ADAATTN_BOOL)
    return static_cast<const std::uint8_t*>(row.data)[key * row.key_stride] != 0 ? 0.0F : kHidden;
  const float value = load_element(row.data, key * row.key_stride, row.dtype);
  return value < kLowestTerm && value != kHidden ? kLowestTerm : value;
}

}  // namespace adaattn::cpu
