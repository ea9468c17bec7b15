// The CUDA rows of the implementation table.
#include "cuda/cuda_kernels.h"

#include <array>

#include "cuda/common/device.h"
#include "cuda/sm90/backward/backward.h"
#include "cuda/sm90/forward/forward.h"

namespace adaattn::cuda {
namespace {

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

constexpr std::array kBackward = {
    BackwardKernel{.name = "sm90_backward",
                   .summary = "exact, float16 and bfloat16 on Hopper tensor cores; D in steps of 8 to 128",
                   .device = ADAATTN_CUDA,
                   .unavailable = needs_sm90,
                   .declines = sm90::declines_backward,
                   .workspace = sm90::backward_workspace,
                   .run = sm90::backward}};

}  // namespace

std::span<const ForwardKernel> forward_kernels() { return sm90::forward_rows(); }
std::span<const BackwardKernel> backward_kernels() { return kBackward; }

}  // namespace adaattn::cuda
