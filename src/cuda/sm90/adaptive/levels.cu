#include <algorithm>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/sm90/adaptive/levels.h"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kAtOnce = 1024;  // of the 4 KiB that a kernel's arguments may take

struct Levels {
  std::int8_t of[kAtOnce];
};

__global__ void levels_kernel(const __grid_constant__ Levels levels, int count, int* to) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = levels.of[i];
}

}  // namespace

void set_levels(const std::vector<int>& levels, int* to, cudaStream_t stream) {
  for (std::size_t first = 0; first < levels.size(); first += kAtOnce) {
    const auto count = std::min<std::size_t>(kAtOnce, levels.size() - first);
    Levels some{};
    for (std::size_t i = 0; i < count; ++i) some.of[i] = static_cast<std::int8_t>(levels[first + i]);
    levels_kernel<<<kAtOnce / 256, 256, 0, stream>>>(some, static_cast<int>(count), to + first);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace adaattn::cuda::sm90
