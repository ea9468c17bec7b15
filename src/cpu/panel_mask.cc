#include "cpu/panel_mask.h"

#include <algorithm>

namespace adaattn::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest() / 2;

float mask_term(const adaattn_tensor& mask, std::int64_t at) {
  if (mask.dtype == ADAATTN_BOOL) return static_cast<const std::uint8_t*>(mask.data)[at] != 0 ? 0.0F : kMinusInfinity;
  const float value = load_element(mask.data, at, mask.dtype);
  return value < kLowest && value != kMinusInfinity ? kLowest : value;
}

}  // namespace

void fill_mask_terms(const adaattn_tensor& mask, const PanelRows& rows, std::int64_t key_begin, std::int64_t key_end,
                     std::size_t lanes, float* terms) {
  const std::int64_t key_stride = mask.shape[3] == 1 ? 0 : mask.stride[3];
  const std::int64_t keys = key_end - key_begin;
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    const std::int64_t row = rows.first + std::min(static_cast<std::int64_t>(lane), rows.count - 1);
    const std::int64_t at = broadcast_offset_of(mask, rows.b, rows.head_of(row), rows.query_of(row), 0);
    for (std::int64_t key = 0; key < keys; ++key)
      terms[static_cast<std::size_t>(key) * lanes + lane] = mask_term(mask, at + (key_begin + key) * key_stride);
  }
}

}  // namespace adaattn::cpu
