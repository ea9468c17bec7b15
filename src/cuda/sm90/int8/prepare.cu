#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/sm90/int8/launch.h"
#include "cuda/sm90/int8/prepare.cuh"

namespace adaattn::cuda::sm90 {
namespace {

template <int kDim, int kKeys>
void quantize_keys(const PrepareParams& params, cudaStream_t stream) {
  const std::int64_t tiles = static_cast<std::int64_t>(params.batch) * params.k.heads * (params.padded_keys / kKeys);
  quantize_keys_kernel<kDim, kKeys><<<static_cast<unsigned>(tiles), kPrepareThreads, 0, stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_prepare(const PrepareParams& params, cudaStream_t stream) {
  if (params.dim == 64)
    quantize_keys<Int8Dim64::kDim, Int8Dim64::kKeys>(params, stream);
  else
    quantize_keys<Int8Dim128::kDim, Int8Dim128::kKeys>(params, stream);
  if (params.v16 == nullptr) return;
  const RowsView& v = params.v;
  const std::int64_t pieces = static_cast<std::int64_t>(params.batch) * v.heads * v.tokens * (v.dim / 8);
  const std::int64_t blocks = std::min<std::int64_t>((pieces + kPrepareThreads - 1) / kPrepareThreads, 1 << 14);
  convert_values_kernel<<<static_cast<unsigned>(blocks), kPrepareThreads, 0, stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
