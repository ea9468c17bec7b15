// Kernels of the pre-pass. Each block of 256 threads reads one piece, 16 bytes a thread and load, all loads in flight
// at once; memory bounds them.
//
// Bytes are made by adding 1.5 * 2^23: the sum's lowest byte is the rounded value in two's complement. Scales are such
// that the largest magnitude of what shares one becomes 127: nothing saturates. NaN and infinities make the scale NaN.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/visibility.h"
#include "cuda/sm90/int8/bytes.cuh"
#include "cuda/sm90/int8/prepare.h"

namespace adaattn::cuda::sm90 {

constexpr int kPrepareThreads = 256;

// One block a tile of kKeys keys, which share a scale. What is taken from all keys alike softmax does not see: the mean
// of 64 evenly spaced keys serves as well as that of all, and every block of a head computes it by itself, which costs
// less than a launch. Rows after the key length become 0.
template <int kDim, int kKeys>
__global__ void __launch_bounds__(kPrepareThreads) quantize_keys_kernel(const PrepareParams params) {
  constexpr int kLanes = kDim / 8, kRows = kPrepareThreads / kLanes, kSteps = kKeys / kRows, kSampled = 64;
  constexpr int kWarps = kPrepareThreads / 32;
  static_assert(kKeys % kRows == 0 && kSampled % kRows == 0);
  __shared__ float sums[kRows][kDim];
  __shared__ float means[kDim];
  __shared__ unsigned largest_of_warp[kWarps], norm_of_warp[kWarps];
  const int tiles = params.padded_keys / kKeys, tile = blockIdx.x % tiles, head = blockIdx.x / tiles;
  const int batch = head / params.k.heads, lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const int count = params.key_lengths == nullptr
                        ? params.k.tokens
                        : static_cast<int>(clamp_index(params.key_lengths[batch], 0, params.k.tokens));
  const std::uint16_t* from =
      params.k.data + batch * params.k.stride[0] + head % params.k.heads * params.k.stride[1] + 8 * lane;
  const bool exists = 8 * lane < params.k.dim;

  uint4 rows[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int token = tile * kKeys + step * kRows + first;
    rows[step] = token < count && exists ? __ldcs(reinterpret_cast<const uint4*>(from + token * params.k.stride[2]))
                                         : make_uint4(0, 0, 0, 0);
  }
  const int sampled = count < kSampled ? count : kSampled;
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < kSampled / kRows; ++i) {
    const int place = i * kRows + first;
    if (place >= sampled || !exists) continue;
    const std::int64_t token = static_cast<std::int64_t>(place) * count / sampled;
    const Eight eight = load_eight(from + token * params.k.stride[2], params.bfloat16);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += eight.value[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) sums[first][8 * lane + j] = sum[j];
  __syncthreads();
  if (threadIdx.x < kDim) {
    float total = 0.0f;
    for (int i = 0; i < kRows; ++i) total += sums[i][threadIdx.x];
    const float mean = sampled == 0 ? 0.0f : total / static_cast<float>(sampled);
    means[threadIdx.x] = mean;
    if (tile == 0) params.key_mean[head * kDim + threadIdx.x] = mean;
  }
  __syncthreads();

  float mean[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) mean[j] = means[8 * lane + j];
  unsigned largest = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (tile * kKeys + step * kRows + first >= count) continue;
    const Eight eight = load_eight(reinterpret_cast<const std::uint16_t*>(&rows[step]), params.bfloat16);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = max(largest, magnitude(eight.value[j] - mean[j]));
  }
  largest = __reduce_max_sync(0xFFFFFFFFu, largest);
  if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (const unsigned other : largest_of_warp) largest = max(largest, other);
  const float scale = scale_of_magnitude(largest), inverse = 1.0f / scale;
  float most = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = tile * kKeys + step * kRows + first;
    const Eight eight = load_eight(reinterpret_cast<const std::uint16_t*>(&rows[step]), params.bfloat16);
    float rounded[8], squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      rounded[j] = fmaf(row < count ? eight.value[j] - mean[j] : 0.0f, inverse, kRounder);
      squares = fmaf(rounded[j] - kRounder, rounded[j] - kRounder, squares);
    }
#pragma unroll
    for (int apart = 1; apart < kLanes; apart *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, apart);
    most = fmaxf(most, squares);
    *reinterpret_cast<uint2*>(params.k8 + (static_cast<std::int64_t>(head) * params.padded_keys + row) * kDim +
                              8 * lane) = make_uint2(low_bytes(rounded[0], rounded[1], rounded[2], rounded[3]),
                                                     low_bytes(rounded[4], rounded[5], rounded[6], rounded[7]));
  }
  const unsigned norm = __reduce_max_sync(0xFFFFFFFFu, __float_as_uint(most));
  if (threadIdx.x % 32 == 0) norm_of_warp[threadIdx.x / 32] = norm;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned all = 0;
    for (const unsigned one : norm_of_warp) all = max(all, one);
    params.tiles[static_cast<std::int64_t>(head) * tiles + tile] = {
        .scale = scale, .norm = sqrtf(__uint_as_float(all)) * scale, .unused = {}};
  }
}

// float16 values as bfloat16: the probabilities' type, whose range the reference needs. Loses three of eleven bits.
__global__ void __launch_bounds__(kPrepareThreads) convert_values_kernel(const PrepareParams params) {
  const RowsView& v = params.v;
  const int pieces = v.dim / 8;
  const std::int64_t count = static_cast<std::int64_t>(params.batch) * v.heads * v.tokens * pieces;
  for (std::int64_t i = blockIdx.x * std::int64_t{kPrepareThreads} + threadIdx.x; i < count;
       i += std::int64_t{kPrepareThreads} * gridDim.x) {
    const std::int64_t row = i / pieces, head = row / v.tokens;
    const Eight eight = load_eight(v.data + head / v.heads * v.stride[0] + head % v.heads * v.stride[1] +
                                       row % v.tokens * v.stride[2] + i % pieces * 8,
                                   false);
    reinterpret_cast<uint4*>(params.v16)[i] = make_uint4(
        pack<__nv_bfloat16>(eight.value[0], eight.value[1]), pack<__nv_bfloat16>(eight.value[2], eight.value[3]),
        pack<__nv_bfloat16>(eight.value[4], eight.value[5]), pack<__nv_bfloat16>(eight.value[6], eight.value[7]));
  }
}

}  // namespace adaattn::cuda::sm90
