// Which heads missed their budget, from the probe rows: they run again with all of their blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/check.h"
#include "cuda/sm90/adaptive/head.cuh"
#include "cuda/sm90/adaptive/stages.h"
#include "cuda/sm90/registers.cuh"
#include "verify/estimate.h"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kThreads = 4 * kProbeRows, kWarps = kThreads / 32;

__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float to_float(__half value) { return __half2float(value); }

// Sums over the 8 rows of a warp whose threads of a row hold the same; every thread gets them.
__device__ float warp_rows_sum(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 4);
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 8);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 16);
}

template <typename T>
__device__ ErrorEstimate measure_error(const AdaptiveShape& shape, const Rows16& out, const AdaptiveArrays& arrays,
                                       int head) {
  __shared__ LevelSums of_warp[kWarps];
  const int row = static_cast<int>(threadIdx.x) / 4, quarter = static_cast<int>(threadIdx.x) % 4;
  const int query = probe_row(row, shape.queries);
  const std::int64_t at =
      head / shape.heads * out.stride[0] + head % shape.heads * out.stride[1] + query * out.stride[2];
  const T* const found = reinterpret_cast<const T*>(out.data) + at;
  const float* const exact = arrays.exact_out + (static_cast<std::int64_t>(head) * kProbeRows + row) * shape.dim;
  float x = 0, y = 0;
  for (int channel = 2 * quarter; channel < shape.dim_v; channel += 8)
    for (int i = 0; i < 2; ++i) {
      const float truth = exact[channel + i], error = to_float(found[channel + i]) - truth;
      x = fmaf(error, error, x), y = fmaf(truth, truth, y);
    }
  x = quad_sum(x), y = quad_sum(y);
  const float counts = shape.seen(query) > 0 ? 1.0f : 0.0f;
  const LevelSums sums = {.x = warp_rows_sum(x),
                          .xx = warp_rows_sum(x * x),
                          .xy = warp_rows_sum(x * y),
                          .y = warp_rows_sum(y),
                          .yy = warp_rows_sum(y * y),
                          .rows = warp_rows_sum(counts)};
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  ProbeSums total;
  for (const LevelSums& more : of_warp) {
    total.rows += more.rows, total.x += more.x, total.y += more.y;
    total.xx += more.xx, total.xy += more.xy, total.yy += more.yy;
  }
  return estimate_error(total, 0.0, 0.0);
}

// One warp of the last thread block lists the heads that run again.
__device__ void list_missed(const AdaptiveShape& shape, const AdaptiveArrays& arrays) {
  const int lane = static_cast<int>(threadIdx.x);
  int count = 0;
  for (int first = 0; first < shape.query_heads(); first += 32) {
    const int head = first + lane;
    const bool missed = head < shape.query_heads() && __ldcg(&arrays.states[head].escalations) > 0;
    const unsigned all = __ballot_sync(0xFFFFFFFFu, missed);
    if (missed) arrays.missed[count + __popc(all & ((1u << lane) - 1))] = head;
    count += __popc(all);
  }
  if (lane == 0) *arrays.missed_count = count;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    verify_kernel(const __grid_constant__ AdaptiveShape shape, const __grid_constant__ Rows16 out,
                  const __grid_constant__ AdaptiveArrays arrays) {
  __shared__ bool last;
  const int head = static_cast<int>(blockIdx.x), heads = shape.query_heads();
  HeadState& state = arrays.states[head];
  if (state.level < kLevels - 1) {  // not dense
    const ErrorEstimate found = measure_error<T>(shape, out, arrays, head);
    const bool accepted = accepts(found, static_cast<double>(shape.error));
    if (!accepted) {
      const std::int64_t first = static_cast<std::int64_t>(head) * shape.tiles();
      for (int tile = threadIdx.x; tile < shape.tiles(); tile += kThreads)
        arrays.kept[first + tile] = arrays.up_to_level[(first + tile) * kLevels + kLevels - 1];
    }
    __syncthreads();  // the level has been read
    if (threadIdx.x == 0) {
      state.value = static_cast<float>(found.value), state.limit = static_cast<float>(found.limit);
      if (!accepted) {
        state.level = kLevels - 1, state.escalations = 1;
        state.value = state.limit = 0;
      }
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicInc(&arrays.counters[heads], static_cast<unsigned>(heads) - 1) == static_cast<unsigned>(heads) - 1;
  __syncthreads();
  if (last && threadIdx.x < 32) list_missed(shape, arrays);
}

}  // namespace

void launch_verify(const AdaptiveShape& shape, Rows16 out, const AdaptiveArrays& arrays, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(shape.query_heads());
  if (shape.bfloat16)
    verify_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(shape, out, arrays);
  else
    verify_kernel<__half><<<blocks, kThreads, 0, stream>>>(shape, out, arrays);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
