#include "cuda/common/device.h"

#include <cuda_runtime_api.h>

#include "common/error.h"
#include "cuda/common/check.h"
#include "cuda/cuda_kernels.h"

namespace adaattn::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  ADAATTN_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// A failed call leaves its error behind for the next cudaGetLastError of whoever shares the runtime: take it back.
int device_count(cudaError_t& status) {
  int count = 0;
  status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess ? count : 0;
}

}  // namespace

Device current_device() {
  int device = 0;
  ADAATTN_CUDA_CHECK(cudaGetDevice(&device));
  return {.capability = capability(device), .multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device)};
}

bool current_device_is(int wanted) {
  int device = 0;
  cudaError_t status;
  if (device_count(status) == 0 || cudaGetDevice(&device) != cudaSuccess) return false;
  return capability(device) == wanted;
}

std::vector<std::string> devices() {
  std::vector<std::string> lines;
  cudaError_t status;
  const int count = device_count(status);
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    ADAATTN_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    lines.push_back(concat(properties.name, ", compute capability ", properties.major, ".", properties.minor, ", ",
                           properties.totalGlobalMem >> 20, " MiB"));
  }
  return lines;
}

std::string unavailable_reason() {
  cudaError_t status;
  if (device_count(status) > 0) return "";
  return status == cudaSuccess ? "no CUDA device" : concat("no usable CUDA device: ", cudaGetErrorString(status));
}

}  // namespace adaattn::cuda
