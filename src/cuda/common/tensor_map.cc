#include "cuda/common/tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/error.h"
#include "cuda/common/check.h"

namespace adaattn::cuda {
namespace {

// By the runtime, so that the library does not link the driver and loads without one.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    ADAATTN_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw StatusError(ADAATTN_INTERNAL_ERROR, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

}  // namespace

bool tensor_map_fits(const adaattn_tensor& tensor) {
  const std::int64_t size = dtype_size(tensor.dtype);
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) return false;
  if (tensor.stride[3] != 1 && tensor.shape[3] != 1) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (tensor.shape[axis] <= 1) continue;
    const std::int64_t bytes = tensor.stride[axis] * size;
    if (bytes <= 0 || bytes % 16 != 0 || bytes >= std::int64_t{1} << 40) return false;
    if (tensor.shape[axis] > std::int64_t{1} << 31) return false;
  }
  return true;
}

CUtensorMap make_tensor_map(const adaattn_tensor& tensor, int rows) {
  const auto type =
      tensor.dtype == ADAATTN_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint64_t size[4], stride[3];
  for (int axis = 0; axis < 4; ++axis) size[axis] = static_cast<cuuint64_t>(tensor.shape[3 - axis]);
  for (int axis = 0; axis < 3; ++axis)  // an axis of one entry is never stepped along: any valid stride will do
    stride[axis] = size[axis + 1] == 1 ? 16 : static_cast<cuuint64_t>(tensor.stride[2 - axis] * 2);
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, type, 4, tensor.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw StatusError(ADAATTN_INTERNAL_ERROR, concat("cuTensorMapEncodeTiled failed with CUresult ", int{result}));
  return map;
}

}  // namespace adaattn::cuda
