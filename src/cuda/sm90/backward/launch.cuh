// The definition that the instantiation files share.
#pragma once

#include "cuda/common/check.h"
#include "cuda/sm90/backward/kernel.cuh"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/backward/rows.cuh"

namespace adaattn::cuda::sm90 {

inline unsigned blocks_for(std::int64_t threads, int block) {
  return static_cast<unsigned>((threads + block - 1) / block);
}

template <typename T, typename Config>
void launch_backward(const BackwardParams& params, const RowParams& rows, cudaStream_t stream) {
  constexpr int kRowThreads = 256, kSharedBytes = sizeof(BackwardShared<Config>);
  static_assert(kSharedBytes <= 227 * 1024, "a block of threads has at most 227 KiB of shared memory");
  const std::int64_t tiles = static_cast<std::int64_t>(rows.batch) * rows.heads * rows.query_tiles;
  const std::int64_t blocks =
      static_cast<std::int64_t>(params.batch) * (params.heads / params.group) * params.key_tiles;
  if (tiles > 0) {
    prepare_rows_kernel<T><<<blocks_for(tiles * Config::kQueries * 16, kRowThreads), kRowThreads, 0, stream>>>(rows);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (blocks > 0) {
    const auto kernel = backward_kernel<T, Config>;
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<static_cast<unsigned>(blocks), Config::kThreads, kSharedBytes, stream>>>(params);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (tiles > 0) {
    finish_dq_kernel<T, Config>
        <<<blocks_for(tiles * Config::kSharedQueries * 4, kRowThreads), kRowThreads, 0, stream>>>(rows);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace adaattn::cuda::sm90
