// A mask tensor as the kernels take it.
#pragma once

#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::cuda::sm80 {

struct MaskView {
  const void* data;        // [batch, head, query, key], null: no mask
  std::int32_t dtype;      // adaattn_dtype
  std::int64_t stride[4];  // in elements, 0 along what is repeated
};

inline MaskView make_mask_view(const adaattn_tensor& mask) {
  MaskView view{.data = mask.data, .dtype = mask.dtype, .stride = {}};
  for (int axis = 0; axis < 4; ++axis) view.stride[axis] = mask.shape[axis] == 1 ? 0 : mask.stride[axis];
  return view;
}

}  // namespace adaattn::cuda::sm80
