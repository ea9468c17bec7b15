#include "cuda/common/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>

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

// What does not change while a process runs: multiprocessors << 16 | capability of each device, 0 until it is asked.
std::array<std::atomic<std::uint32_t>, 64> known_devices;

Device describe(int device) {
  const bool kept = device < static_cast<int>(known_devices.size());
  std::uint32_t packed = kept ? known_devices[static_cast<std::size_t>(device)].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    packed = static_cast<std::uint32_t>(attribute(cudaDevAttrMultiProcessorCount, device)) << 16 |
             static_cast<std::uint32_t>(capability(device));
    if (kept) known_devices[static_cast<std::size_t>(device)].store(packed, std::memory_order_relaxed);
  }
  return {.index = device,
          .capability = static_cast<int>(packed & 0xFFFF),
          .multiprocessors = static_cast<int>(packed >> 16)};
}

// 0 without a device.
int current_capability() {
  static std::atomic<bool> some{false};  // a machine that had a device keeps it
  cudaError_t status;
  if (!some.load(std::memory_order_relaxed)) {
    if (device_count(status) == 0) return 0;
    some.store(true, std::memory_order_relaxed);
  }
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? describe(device).capability : 0;
}

}  // namespace

Device current_device() {
  int device = 0;
  ADAATTN_CUDA_CHECK(cudaGetDevice(&device));
  return describe(device);
}

bool current_device_is(int wanted) { return current_capability() == wanted; }

bool current_device_reaches(int wanted) { return current_capability() >= wanted; }

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
