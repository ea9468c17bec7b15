// The order in which a tile's blocks of keys matter to its rows, told by the screen.
#include <cuda_runtime.h>

#include "cuda/common/check.h"
#include "cuda/sm90/adaptive/head.cuh"
#include "cuda/sm90/adaptive/stages.h"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kThreads = 128;

// Of the largest distance of any row, in powers of two.
__device__ int level_of(float distance) {
  if (!(distance <= 0)) return 0;  // NaN
  const float steps = -distance * kLevelsPerPower;
  return steps < kLevels - 2 ? 1 + static_cast<int>(steps) : kLevels - 1;
}

__global__ void __launch_bounds__(kThreads)
    order_kernel(const __grid_constant__ AdaptiveShape shape, const __grid_constant__ AdaptiveArrays arrays) {
  __shared__ std::uint8_t level[kMostBlocks];
  const int tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int first = tile * shape.tile_rows, last = min(first + shape.tile_rows, shape.queries) - 1;
  const int blocks = shape.blocks(), visible = (shape.seen(last) + kBlockKeys - 1) / kBlockKeys;
  const int edge = max(shape.seen(first) - 1, 0) / kBlockKeys;  // the last block that every row sees a key of
  const bool screened = is_screened(shape, arrays, head);
  const std::int64_t at = static_cast<std::int64_t>(head) * shape.tiles() + tile;
  std::uint16_t* const order = arrays.order + at * blocks;
  std::uint16_t* const up_to = arrays.up_to_level + at * kLevels;
  if (!screened) {
    for (int i = threadIdx.x; i < visible; i += kThreads) order[i] = static_cast<std::uint16_t>(visible - 1 - i);
    if (threadIdx.x < kLevels) up_to[threadIdx.x] = static_cast<std::uint16_t>(visible);
    return;
  }
  // Rows at a block's start find their neighbours in the block before it.
  const int kept_from = shape.causal ? edge - 1 : edge;
  const int first_strip = first / kScreenRows, end_strip = last / kScreenRows + 1;
  const float* const distances = arrays.distances + static_cast<std::int64_t>(head) * shape.screen_strips() * blocks;
  for (int block = threadIdx.x; block < visible; block += kThreads) {
    float distance = distances[first_strip * blocks + block];
    for (int strip = first_strip + 1; strip < end_strip; ++strip) {
      const float other = distances[strip * blocks + block];
      distance = other > distance || other != other ? other : distance;
    }
    level[block] = static_cast<std::uint8_t>(block >= kept_from ? 0 : level_of(distance));
  }
  __syncthreads();
  for (int block = threadIdx.x; block < visible; block += kThreads) {
    const int own = level[block];
    int before = 0;
    for (int other = 0; other < visible; ++other)
      before += static_cast<int>(level[other] < own || (level[other] == own && other > block));
    order[before] = static_cast<std::uint16_t>(block);
  }
  if (threadIdx.x < kLevels) {
    int count = 0;
    for (int block = 0; block < visible; ++block) count += static_cast<int>(level[block] <= threadIdx.x);
    up_to[threadIdx.x] = static_cast<std::uint16_t>(count);
  }
}

}  // namespace

void launch_order(const AdaptiveShape& shape, const AdaptiveArrays& arrays, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(shape.tiles()), static_cast<unsigned>(shape.query_heads()));
  order_kernel<<<grid, kThreads, 0, stream>>>(shape, arrays);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
