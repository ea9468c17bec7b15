// The tile sizes that are built, and how the three kernels of a backward pass are launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/backward/config.h"

namespace adaattn::cuda::sm90 {

template <bool kOrdered>
using BackwardDim64 = BackwardConfig<64, 128, false, kOrdered>;
template <bool kOrdered>
using BackwardDim128 = BackwardConfig<128, 64, true, kOrdered>;

// What happens once per query row.
struct RowParams {
  const void *out, *dout;  // [batch, heads, query_count, dim_v]
  std::int64_t out_stride[3], dout_stride[3];
  const float* lse;  // [batch, heads, query_count]
  float* rows;       // as BackwardParams has it; written by prepare
  const float* dq_sums;
  void* dq;  // [batch, heads, query_count, dim]
  std::int64_t dq_stride[3];
  float scale;
  int batch, heads, query_count, query_tiles, tile_queries, dim, dim_v;
};

template <typename T, typename Config>
void launch_backward(const BackwardParams& params, const RowParams& rows, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
