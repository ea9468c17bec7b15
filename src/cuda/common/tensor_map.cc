#include "cuda/common/tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/error.h"
#include "cuda/common/check.h"
#include "cuda/common/driver.h"

namespace adaattn::cuda {
namespace {

decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  return function;
}

void check_driver(CUresult result, const char* name) {
  if (result != CUDA_SUCCESS)
    throw StatusError(ADAATTN_INTERNAL_ERROR, concat(name, " failed with CUresult ", int{result}));
}

// A thread that has launched nothing yet has no current context, and describing a tensor wants one: autograd's threads
// are such, and neither cudaGetDevice nor cudaSetDevice gives them one. The runtime's is the primary one.
void give_context() {
  static const auto current = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent", 12000);
  CUcontext context = nullptr;
  check_driver(current(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  static const auto find = driver_function<decltype(&cuDeviceGet)>("cuDeviceGet", 12000);
  static const auto retain = driver_function<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain", 12000);
  static const auto set = driver_function<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent", 12000);
  int device = 0;
  ADAATTN_CUDA_CHECK(cudaGetDevice(&device));
  CUdevice handle = 0;
  check_driver(find(&handle, device), "cuDeviceGet");
  check_driver(retain(&context, handle), "cuDevicePrimaryCtxRetain");  // for the process's life, as the runtime does
  check_driver(set(context), "cuCtxSetCurrent");
}

// Axes from the innermost; strides in bytes, of all but the innermost.
template <int kAxes>
CUtensorMap encode(const adaattn_tensor& tensor, const cuuint64_t (&size)[kAxes], cuuint64_t (&stride)[kAxes - 1],
                   const cuuint32_t (&box)[kAxes]) {
  const auto type =
      tensor.dtype == ADAATTN_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint32_t step[kAxes];
  for (int axis = 0; axis < kAxes; ++axis) step[axis] = 1;
  for (int axis = 1; axis < kAxes; ++axis)  // an axis of one entry is never stepped along: any valid stride will do
    if (size[axis] == 1) stride[axis - 1] = 16;
  CUtensorMap map;
  give_context();
  const CUresult result =
      encoder()(&map, type, kAxes, tensor.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_driver(result, "cuTensorMapEncodeTiled");
  return map;
}

cuuint64_t unsigned_of(std::int64_t value) { return static_cast<cuuint64_t>(value); }

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
  const cuuint64_t size[4] = {unsigned_of(tensor.shape[3]), unsigned_of(tensor.shape[2]), unsigned_of(tensor.shape[1]),
                              unsigned_of(tensor.shape[0])};
  cuuint64_t stride[3] = {unsigned_of(tensor.stride[2] * 2), unsigned_of(tensor.stride[1] * 2),
                          unsigned_of(tensor.stride[0] * 2)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1};
  return encode(tensor, size, stride, box);
}

CUtensorMap make_packed_tensor_map(const adaattn_tensor& tensor, int group, int heads, int tokens) {
  const cuuint64_t size[5] = {unsigned_of(tensor.shape[3]), unsigned_of(group), unsigned_of(tensor.shape[2]),
                              unsigned_of(tensor.shape[1] / group), unsigned_of(tensor.shape[0])};
  cuuint64_t stride[4] = {unsigned_of(tensor.stride[1] * 2), unsigned_of(tensor.stride[2] * 2),
                          unsigned_of(tensor.stride[1] * 2 * group), unsigned_of(tensor.stride[0] * 2)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(heads), static_cast<cuuint32_t>(tokens), 1, 1};
  return encode(tensor, size, stride, box);
}

CUtensorMap make_byte_map(const void* data, std::int64_t rows, std::int64_t row_bytes, int box_rows, int box_bytes) {
  const cuuint64_t size[2] = {unsigned_of(row_bytes), unsigned_of(rows)}, stride[1] = {unsigned_of(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), size, stride, box,
                                    step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw StatusError(ADAATTN_INTERNAL_ERROR, concat("cuTensorMapEncodeTiled failed with CUresult ", int{result}));
  return map;
}

}  // namespace adaattn::cuda
