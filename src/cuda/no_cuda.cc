// What a build without nvcc links in place of the CUDA kernels.
#include "cuda/cuda_kernels.h"

namespace adaattn::cuda {

std::span<const ForwardKernel> forward_kernels() { return {}; }
std::span<const BackwardKernel> backward_kernels() { return {}; }
std::vector<std::string> devices() { return {}; }
std::string unavailable_reason() { return "built without CUDA"; }

}  // namespace adaattn::cuda
