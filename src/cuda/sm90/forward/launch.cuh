// The definition that the instantiation files share.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/check.h"
#include "cuda/common/once.h"
#include "cuda/sm90/forward/combine.cuh"
#include "cuda/sm90/forward/kernel.cuh"
#include "cuda/sm90/forward/launch.h"

namespace adaattn::cuda::sm90 {

template <typename T, typename Config>
void launch_forward(const ForwardParams& params, const ForwardLaunch& launch) {
  constexpr int kSharedBytes = shared_bytes<Config>();
  static_assert(kSharedBytes <= 227 * 1024, "a block of threads has at most 227 KiB of shared memory");
  static_assert((kSharedBytes + 1024) * Config::kBlocks <= 228 * 1024, "nor has a multiprocessor more than 228");
  const auto kernel = forward_kernel<T, Config>;
  static OncePerDevice prepared;
  prepared.run(launch.device, [&] {
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    // All of the memory that is shared between L1 and this, or a second block may not fit.
    ADAATTN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  });
  kernel<<<launch.blocks, Config::kThreads, kSharedBytes, launch.stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
  if constexpr (Config::kParts) {
    if (params.grid.parts == 1) return;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    const int tiles = tile_count(params.grid) - params.grid.whole_tiles;
    config.gridDim = dim3(static_cast<unsigned>(tiles * combined_rows<Config>(params.grid)));
    config.blockDim = dim3(32 * kCombineWarps);
    config.stream = launch.stream;
    config.attrs = &early;
    config.numAttrs = 1;
    ADAATTN_CUDA_CHECK(cudaLaunchKernelEx(&config, combine_kernel<T, Config>, params));
  }
}

}  // namespace adaattn::cuda::sm90
