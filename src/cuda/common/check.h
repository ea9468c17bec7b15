// Turns a failed CUDA runtime call into the library's error.
#pragma once

#include <cuda_runtime_api.h>

#include "common/error.h"

// The one macro of the CUDA code: it names the call that failed.
#define ADAATTN_CUDA_CHECK(call)                                  \
  if (const cudaError_t status_ = (call); status_ != cudaSuccess) \
  throw ::adaattn::StatusError(ADAATTN_INTERNAL_ERROR,            \
                               ::adaattn::concat(#call, " failed: ", cudaGetErrorString(status_)))
