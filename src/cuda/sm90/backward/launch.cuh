// What the instantiation files share: the kernels of a backward pass one after the other.
#pragma once

#include "cuda/common/check.h"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/backward/rows.cuh"

namespace adaattn::cuda::sm90 {

// kernel is the main one, which takes so many bytes of shared memory.
template <typename T, typename Config, int kSharedBytes>
void launch_around(void (*kernel)(BackwardParams), const BackwardParams& params, cudaStream_t stream) {
  static_assert(kSharedBytes <= 227 * 1024, "a block of threads has at most 227 KiB of shared memory");
  const auto tiles = static_cast<unsigned>(params.batch * params.heads * params.query_tiles);
  const auto blocks = static_cast<unsigned>(params.batch * (params.heads / params.group) * params.key_tiles);
  if (tiles > 0) {
    prepare_rows_kernel<T, Config><<<tiles, PrepareRows<Config>::kThreads, 0, stream>>>(params);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (blocks > 0) {
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<blocks, Config::kThreads, kSharedBytes, stream>>>(params);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (tiles > 0) {
    finish_dq_kernel<T, Config><<<tiles, DqPiece<T, Config>::kPerTile, 0, stream>>>(params);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace adaattn::cuda::sm90
