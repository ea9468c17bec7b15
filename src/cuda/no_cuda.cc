// What a build without nvcc links in place of the CUDA kernels.
#include "common/error.h"
#include "cuda/cuda_kernels.h"

namespace adaattn::cuda {

std::span<const ForwardKernel> forward_kernels() { return {}; }
std::span<const BackwardKernel> backward_kernels() { return {}; }
void merge(const adaattn_merge_args&) {
  throw StatusError(ADAATTN_UNSUPPORTED,
                    concat("parts are on cuda, but here merge takes cpu tensors only: ", unavailable_reason()));
}
std::vector<std::string> devices() { return {}; }
std::string unavailable_reason() { return "built without CUDA"; }

}  // namespace adaattn::cuda
