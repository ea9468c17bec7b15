// Descriptions of strided tensors for the bulk copy engine (TMA).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::cuda {

// Whether the copy engine can address it: dim contiguous, the other strides multiples of 16 bytes and not negative,
// data on 16 bytes.
bool tensor_map_fits(const adaattn_tensor& tensor);

// Boxes of rows x 64 elements of 16 bits, written to shared memory with the 128-byte swizzle; zeros outside the tensor.
// The tensor has elements and fits.
CUtensorMap make_tensor_map(const adaattn_tensor& tensor, int rows);

// The same for tiles whose rows are queries of several heads: [batch, heads / group, tokens, group, dim], boxes of
// tokens x heads x 64 elements. The heads of a whole tensor lie less than 2^40 bytes apart.
CUtensorMap make_packed_tensor_map(const adaattn_tensor& tensor, int group, int heads, int tokens);

// Boxes of box_rows x box_bytes of a contiguous matrix of bytes, written with a swizzle over box_bytes, 64 or 128.
CUtensorMap make_byte_map(const void* data, std::int64_t rows, std::int64_t row_bytes, int box_rows, int box_bytes);

}  // namespace adaattn::cuda
