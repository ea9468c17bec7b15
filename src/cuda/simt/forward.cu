// Exact float32 attention on ordinary cores: any strides, head sizes to 256, masks and statistics. What runs when
// nothing faster takes a call, and what the faster kernels are compared with.
//
// Eight warps keep four rows of queries each. They walk over blocks of 32 keys in shared memory: first a lane is a key,
// then, with probabilities passed around, a lane is every 32nd column of the output.
#include <cmath>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/once.h"
#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/simt/launch.h"
#include "cuda/simt/rows.cuh"
#include "cuda/sm80/mask.cuh"
#include "cuda/sm80/reach.cuh"

namespace adaattn::cuda::simt {
namespace {

constexpr int kWarpRows = 4, kQueries = kWarps * kWarpRows, kKeys = 32;

template <int kDim>
struct Shared {
  alignas(16) float q[kQueries][kDim];
  alignas(16) float k[kKeys][kDim + 4];  // lanes read different rows: without the 4 all from the same banks
  alignas(16) float v[kKeys][kDim];
};

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = ptx::max_nan(value, __shfl_xor_sync(kAll, value, distance));
  return value;
}

struct Row {
  float max = -INFINITY;
  float sum = 0.0f, moment = 0.0f;  // of this lane's keys: of p, and of p log(p), both relative to the maximum
};

// This lane's score becomes its probability relative to the row's new maximum; returns what the output so far has to be
// multiplied with.
__device__ __forceinline__ float exponentiate(float& score, Row& row) {
  const float before = row.max;
  row.max = ptx::max_nan(before, warp_max(score));
  const float base = row.max == -INFINITY ? 0.0f : row.max, correction = expf(before - base);
  const float exponent = score - base;
  score = expf(exponent);
  const float old = row.sum == 0.0f ? 0.0f : fmaf(row.sum, before - base, row.moment);
  row.moment = fmaf(old, correction, score * fmaxf(exponent, -200.0f));  // exp(-200) is 0, and -inf times it is NaN
  row.sum = fmaf(row.sum, correction, score);
  return correction;
}

template <int kDim>
__device__ __forceinline__ void store_row(const ForwardParams& params, int batch, int head, int query, const Row& row,
                                          const float (&out)[kDim / 32]) {
  const int lane = threadIdx.x % 32;
  const float sum = warp_sum(row.sum), moment = warp_sum(row.moment), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  float* to =
      params.out.data + batch * params.out.stride[0] + head * params.out.stride[1] + query * params.out.stride[2];
#pragma unroll
  for (int j = 0; j < kDim / 32; ++j)
    if (const int column = 32 * j + lane; column < params.dim_v) to[column * params.out.stride[3]] = out[j] * inverse;
  if (lane != 0) return;
  const std::int64_t at = (static_cast<std::int64_t>(batch) * params.heads + head) * params.query_count + query;
  const float entropy = logf(sum) - moment / sum;
  if (params.lse != nullptr) params.lse[at] = sum == 0.0f ? -INFINITY : row.max + logf(sum);
  if (params.entropy != nullptr) params.entropy[at] = sum == 0.0f || entropy < 0.0f ? 0.0f : entropy;
  if (params.max_probability != nullptr) params.max_probability[at] = inverse;  // the largest is 1 before the division
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ ForwardParams params) {
  if (params.only_if != nullptr && *params.only_if == 0) return;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(memory);
  const int lane = threadIdx.x % 32, first_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int padded_dim = (params.dim + 3) / 4 * 4;
  const std::int64_t tiles_per_head = (params.query_count + kQueries - 1) / kQueries;
  const std::int64_t tiles = tiles_per_head * params.batch * params.heads;
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int head = static_cast<int>(tile / tiles_per_head % params.heads);
    const int batch = static_cast<int>(tile / tiles_per_head / params.heads), key_head = head / params.group;
    const int first_query = static_cast<int>(tiles_per_head - 1 - tile % tiles_per_head) * kQueries;
    const int end_query = min(first_query + kQueries, params.query_count);
    const sm80::Reach reach = sm80::reach_of(params.visibility, params.bottom_right, params.key_lengths, batch,
                                             params.query_count, params.key_count);
    const sm80::Keys any = sm80::keys_of(reach, first_query, end_query - 1);
    __syncthreads();  // the last tile's queries are no longer read
    load_rows(shared.q, params.q, batch, head, first_query, end_query, params.dim, padded_dim);

    float out[kWarpRows][kDim / 32] = {};
    Row rows[kWarpRows];
    for (int first_key = 0; first_key < any.end; first_key += kKeys) {
      if (first_key >= any.sink_end && first_key + kKeys <= any.begin) continue;
      __syncthreads();
      load_rows(shared.k, params.k, batch, key_head, first_key, any.end, params.dim, padded_dim);
      load_rows(shared.v, params.v, batch, key_head, first_key, any.end, params.dim_v, kDim);
      __syncthreads();

      float scores[kWarpRows] = {};
      add_products(scores, shared.q, first_row, shared.k, padded_dim);
      const int key = first_key + lane;
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const int query = first_query + first_row + r;
        const sm80::Keys seen = sm80::keys_of(reach, query, query);
        bool hidden = query >= end_query || key >= seen.end || (key < seen.begin && key >= seen.sink_end);
        scores[r] *= params.scale;
        if (!hidden && params.mask.data != nullptr) {
          const float term =
              sm80::mask_term<float>(params.mask, sm80::mask_offset(params.mask, batch, head, query, key));
          hidden = term == -INFINITY;
          scores[r] += term;
        }
        if (hidden) scores[r] = -INFINITY;
        const float correction = exponentiate(scores[r], rows[r]);
#pragma unroll
        for (float& value : out[r]) value *= correction;
      }
#pragma unroll 4
      for (int j = 0; j < kKeys; ++j) {
        float p[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) p[r] = __shfl_sync(kAll, scores[r], j);
#pragma unroll
        for (int c = 0; c < kDim / 32; ++c) {
          const float v = shared.v[j][32 * c + lane];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) out[r][c] = fmaf(p[r], v, out[r][c]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r)
      if (const int query = first_query + first_row + r; query < end_query)
        store_row<kDim>(params, batch, head, query, rows[r], out[r]);
  }
}

template <int kDim>
void launch(const ForwardParams& params, cudaStream_t stream) {
  const Device device = current_device();
  static OncePerDevice prepared;
  prepared.run(device.index, [&] {
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(forward_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(sizeof(Shared<kDim>))));
  });
  const std::int64_t tiles =
      (params.query_count + kQueries - 1) / kQueries * static_cast<std::int64_t>(params.batch) * params.heads;
  const std::int64_t slots = std::int64_t{device.multiprocessors} * (kDim == 256 ? 2 : 4);
  forward_kernel<kDim>
      <<<static_cast<unsigned>(tiles < slots ? tiles : slots), kThreads, sizeof(Shared<kDim>), stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const int dim = params.dim > params.dim_v ? params.dim : params.dim_v;
  if (dim <= 64) return launch<64>(params, stream);
  if (dim <= 128) return launch<128>(params, stream);
  launch<256>(params, stream);
}

}  // namespace adaattn::cuda::simt
