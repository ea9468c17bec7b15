// The definition that the instantiation files share.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/check.h"
#include "cuda/common/once.h"
#include "cuda/sm90/int8/kernel.cuh"
#include "cuda/sm90/int8/launch.h"

namespace adaattn::cuda::sm90 {

template <typename Config>
void launch_int8(const Int8Params& params, const ForwardLaunch& launch) {
  constexpr int kSharedBytes = sizeof(Int8Shared<Config>);
  static_assert(kSharedBytes <= 227 * 1024, "a block of threads has at most 227 KiB of shared memory");
  const auto kernel = int8_forward_kernel<Config>;
  static OncePerDevice prepared;
  prepared.run(launch.device, [&] {
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  });
  kernel<<<launch.blocks, Config::kThreads, kSharedBytes, launch.stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
