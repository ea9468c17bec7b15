// The definition that the instantiation files share.
#pragma once

#include "cuda/common/check.h"
#include "cuda/sm90/forward/kernel.cuh"
#include "cuda/sm90/forward/launch.h"

namespace adaattn::cuda::sm90 {

template <typename T, typename Config>
void launch_forward(const ForwardParams& params, int blocks, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(ForwardShared<Config>);
  static_assert(kSharedBytes <= 227 * 1024, "a block of threads has at most 227 KiB of shared memory");
  const auto kernel = forward_kernel<T, Config>;
  ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<blocks, Config::kThreads, kSharedBytes, stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
