// A strided [batch, head, token, dim] tensor as the kernels take it: dim contiguous, rows on 16 bytes.
#pragma once

#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::cuda::sm80 {

struct MatrixView {
  void* data;
  std::int64_t stride[3];  // of batch, head and token, in elements
};

inline MatrixView make_matrix_view(const adaattn_tensor& tensor) {
  return {.data = tensor.data, .stride = {tensor.stride[0], tensor.stride[1], tensor.stride[2]}};
}

// Whether pieces of 16 bytes can be read and written: all but dim may have any stride of whole pieces.
inline bool matrix_view_fits(const adaattn_tensor& tensor) {
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) return false;
  if (tensor.stride[3] != 1 && tensor.shape[3] != 1) return false;
  for (int axis = 0; axis < 3; ++axis)
    if (tensor.shape[axis] > 1 && tensor.stride[axis] % 8 != 0) return false;
  return true;
}

}  // namespace adaattn::cuda::sm80
