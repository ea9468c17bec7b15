// The definition that the instantiation files share.
#pragma once

#include "cuda/common/check.h"
#include "cuda/sm80/forward/kernel.cuh"
#include "cuda/sm80/forward/launch.h"

namespace adaattn::cuda::sm80 {

template <typename T, typename Config, bool kGeneral>
void launch_forward(const ForwardParams& params, int blocks, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(ForwardShared<Config>);
  static_assert(kSharedBytes <= 163 * 1024, "a block of threads has at most 163 KiB of shared memory on sm_80");
  const auto kernel = forward_kernel<T, Config, kGeneral>;
  ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<blocks, Config::kThreads, kSharedBytes, stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm80
