// Merges attention over disjoint key sets by their log-sum-exp on a CUDA device (ring attention, arXiv 2310.01889).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/error.h"
#include "cuda/common/check.h"
#include "cuda/cuda_kernels.h"

namespace adaattn::cuda {
namespace {

constexpr int kMostParts = 32, kWarps = 8;  // parts are kernel parameters, 4 KiB at most

struct StridedTensor {
  void* data;
  std::int64_t stride[4];
};

struct MergeParams {
  StridedTensor parts[kMostParts], out;
  const float* part_lses[kMostParts];
  float* lse;
  int count;
  std::int64_t heads, tokens, dim, rows;
};
static_assert(sizeof(MergeParams) <= 4096);

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
__device__ T from_float(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return T(value);
}

// A warp a row, lane i with the weight of part i. out may be one of the parts, and lse one of theirs: each element is
// read by the thread that writes it, and every lse of a row before its lse is written.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) merge_kernel(const __grid_constant__ MergeParams params) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= params.rows) return;
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const int lane = threadIdx.x % 32;
  const float own = lane < params.count ? params.part_lses[lane][row] : -INFINITY;
  const bool any_nan = __any_sync(kAll, isnan(own));
  float top = own;
  for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, distance));
  const float base = top == -INFINITY ? 0.0f : top;
  float weight = any_nan && own != -INFINITY ? NAN : expf(own - base), sum = weight;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (own != -INFINITY) weight /= sum;  // parts without keys do not count, whatever they hold
  const unsigned counted = __ballot_sync(kAll, own != -INFINITY);

  const std::int64_t b = row / (params.heads * params.tokens), h = row / params.tokens % params.heads,
                     n = row % params.tokens;
  const auto at = [&](const StridedTensor& tensor, std::int64_t d) -> T& {
    return static_cast<T*>(
        tensor.data)[b * tensor.stride[0] + h * tensor.stride[1] + n * tensor.stride[2] + d * tensor.stride[3]];
  };
  for (std::int64_t first = 0; first < params.dim; first += 32) {
    const std::int64_t d = first + lane;
    float value = 0.0f;
    for (int part = 0; part < params.count; ++part) {
      const float share = __shfl_sync(kAll, weight, part);
      if ((counted >> part & 1) != 0 && d < params.dim) value = fmaf(share, to_float(at(params.parts[part], d)), value);
    }
    if (d < params.dim) at(params.out, d) = from_float<T>(value);
  }
  if (lane == 0 && params.lse != nullptr) params.lse[row] = sum == 0.0f ? -INFINITY : base + logf(sum);
}

StridedTensor strided(const adaattn_tensor& tensor) {
  StridedTensor result{.data = tensor.data};
  std::copy_n(tensor.stride, 4, result.stride);
  return result;
}

}  // namespace

void merge(const adaattn_merge_args& args) {
  if (const std::string reason = unavailable_reason(); !reason.empty())
    throw StatusError(ADAATTN_UNSUPPORTED,
                      concat("parts are on cuda, but here merge takes cpu tensors only: ", reason));
  if (args.count > kMostParts)
    throw StatusError(ADAATTN_UNSUPPORTED,
                      concat("count is ", args.count, ", on cuda at most ", kMostParts, " parts are merged at a time"));
  MergeParams params{};
  for (int part = 0; part < args.count; ++part) {
    params.parts[part] = strided(args.parts[part]);
    params.part_lses[part] = args.part_lses[part];
  }
  params.out = strided(args.out);
  params.lse = args.lse;
  params.count = static_cast<int>(args.count);
  params.heads = args.out.shape[1], params.tokens = args.out.shape[2], params.dim = args.out.shape[3];
  params.rows = args.out.shape[0] * params.heads * params.tokens;
  if (params.rows == 0) return;
  const std::int64_t blocks = (params.rows + kWarps - 1) / kWarps;
  if (blocks > 0x7FFFFFFF)
    throw StatusError(ADAATTN_UNSUPPORTED, concat("out has ", params.rows, " rows, on cuda at most 2^34 are merged"));
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0, static_cast<cudaStream_t>(args.stream)>>>(params);
  };
  switch (args.out.dtype) {
    case ADAATTN_FLOAT32: launch(merge_kernel<float>); break;
    case ADAATTN_FLOAT16: launch(merge_kernel<__half>); break;
    default: launch(merge_kernel<__nv_bfloat16>);
  }
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda
