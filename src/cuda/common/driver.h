// Functions of the CUDA driver by the runtime, so that the library does not link the driver and loads without one.
#pragma once

#include <cuda_runtime_api.h>

#include "common/error.h"
#include "cuda/common/check.h"

namespace adaattn::cuda {

// Of the given version of CUDA: 12000 for 12.0. Look it up once.
template <typename Function>
Function driver_function(const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  ADAATTN_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess)
    throw StatusError(ADAATTN_INTERNAL_ERROR, concat("the CUDA driver has no ", name));
  return reinterpret_cast<Function>(entry);
}

}  // namespace adaattn::cuda
