// Brings the levels of given plans to the device.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

namespace adaattn::cuda::sm90 {

// By kernel arguments, so that levels may go once this returns, and graphs can be captured.
void set_levels(const std::vector<int>& levels, int* to, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
