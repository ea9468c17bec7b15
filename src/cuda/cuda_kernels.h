// The rows of the implementation table that run on CUDA devices. no_cuda.cc answers in builds without nvcc.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "dispatch/kernel_table.h"

namespace adaattn::cuda {

std::span<const ForwardKernel> forward_kernels();
std::span<const BackwardKernel> backward_kernels();

// args as adaattn_merge documents, already validated. Throws where no device can be used, and for more than 32 parts.
void merge(const adaattn_merge_args& args);

// One line per device: name, compute capability, memory. Empty without a device or driver.
std::vector<std::string> devices();

// Why no device can be used; empty if one can.
std::string unavailable_reason();

}  // namespace adaattn::cuda
