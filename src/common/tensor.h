// Addressing of the strided [b, h, n, d] views of the C interface.
#pragma once

#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/dtype.h"

namespace adaattn {

constexpr std::int64_t offset_of(const adaattn_tensor& t, std::int64_t b, std::int64_t h, std::int64_t n,
                                 std::int64_t d) {
  return b * t.stride[0] + h * t.stride[1] + n * t.stride[2] + d * t.stride[3];
}

// As offset_of, where dimensions of size 1 repeat (masks).
constexpr std::int64_t broadcast_offset_of(const adaattn_tensor& t, std::int64_t b, std::int64_t h, std::int64_t n,
                                           std::int64_t d) {
  return (t.shape[0] == 1 ? 0 : b * t.stride[0]) + (t.shape[1] == 1 ? 0 : h * t.stride[1]) +
         (t.shape[2] == 1 ? 0 : n * t.stride[2]) + (t.shape[3] == 1 ? 0 : d * t.stride[3]);
}

inline float load(const adaattn_tensor& t, std::int64_t b, std::int64_t h, std::int64_t n, std::int64_t d) {
  return load_element(t.data, offset_of(t, b, h, n, d), t.dtype);
}

}  // namespace adaattn
