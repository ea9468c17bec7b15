// The definition that the instantiation files share.
#pragma once

#include "cuda/common/check.h"
#include "cuda/sm80/backward/kernel.cuh"
#include "cuda/sm80/backward/launch.h"
#include "cuda/sm80/backward/rows.cuh"

namespace adaattn::cuda::sm80 {

template <typename T, typename Config, bool kMasked>
void launch_backward(const BackwardParams& params, const RowParams& rows, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BackwardShared<Config>);
  static_assert(kSharedBytes <= 163 * 1024, "a block of threads has at most 163 KiB of shared memory on sm_80");
  static_assert(Config::kQueries * 16 % Config::kThreads == 0, "whole blocks of threads prepare a tile");
  const auto tiles = static_cast<unsigned>(rows.batch * rows.heads * rows.query_tiles);
  const auto blocks = static_cast<unsigned>(params.batch * (params.heads / params.group) * params.key_tiles);
  if (tiles > 0) {
    const unsigned row_blocks = tiles * (Config::kQueries * 16 / Config::kThreads);
    prepare_rows_kernel<T, Config><<<row_blocks, Config::kThreads, 0, stream>>>(rows);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (blocks > 0) {
    const auto kernel = backward_kernel<T, Config, kMasked>;
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<blocks, Config::kThreads, kSharedBytes, stream>>>(params);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (tiles > 0) {
    finish_dq_kernel<T, Config><<<tiles, Config::kThreads, 0, stream>>>(rows);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace adaattn::cuda::sm80
