// Some rows of one head of a caller's tensor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/tensor.h"

namespace adaattn::cpu {

struct Rows {
  const void* data;  // first element of the first row
  std::int32_t dtype;
  std::int64_t row_stride, element_stride;  // in elements
  std::size_t dim;                          // elements of a row
};

inline Rows rows_of(const adaattn_tensor& t, std::int64_t b, std::int64_t h, std::int64_t first_row) {
  // An empty tensor, or one that was not given, may be NULL.
  const std::int64_t offset = t.data != nullptr ? offset_of(t, b, h, first_row, 0) * dtype_size(t.dtype) : 0;
  return {.data = static_cast<const std::byte*>(t.data) + offset,
          .dtype = t.dtype,
          .row_stride = t.stride[2],
          .element_stride = t.stride[3],
          .dim = static_cast<std::size_t>(t.shape[3])};
}

}  // namespace adaattn::cpu
