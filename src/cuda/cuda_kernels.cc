// The CUDA rows of the implementation table.
#include "cuda/cuda_kernels.h"

#include <array>
#include <vector>

#include "cuda/common/device.h"
#include "cuda/sm80/backward/backward.h"
#include "cuda/sm80/forward/forward.h"
#include "cuda/sm90/backward/backward.h"
#include "cuda/sm90/forward/forward.h"

namespace adaattn::cuda {
namespace {

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

Reasons needs_sm80() {
  return Reasons().unless(current_device_is(80) || current_device_is(90),
                          "needs a current device of compute capability 8.0 or 9.0 (A100, H100, H200)");
}

constexpr ForwardKernel kForwardSm80 = {
    .name = "sm80_forward",
    .summary = "exact, float16 and bfloat16 on tensor cores; D in steps of 8 to 256, masks, statistics",
    .device = ADAATTN_CUDA,
    .unavailable = needs_sm80,
    .declines = sm80::declines_forward,
    .workspace = sm80::forward_workspace,
    .run = sm80::forward};

constexpr std::array kBackward = {
    BackwardKernel{.name = "sm90_backward",
                   .summary = "exact, float16 and bfloat16 on Hopper tensor cores; D in steps of 8 to 128",
                   .device = ADAATTN_CUDA,
                   .unavailable = needs_sm90,
                   .declines = sm90::declines_backward,
                   .workspace = sm90::backward_workspace,
                   .run = sm90::backward},
    BackwardKernel{.name = "sm80_backward",
                   .summary = "exact, float16 and bfloat16 on tensor cores; D in steps of 8 to 128, masks",
                   .device = ADAATTN_CUDA,
                   .unavailable = needs_sm80,
                   .declines = sm80::declines_backward,
                   .workspace = sm80::backward_workspace,
                   .run = sm80::backward}};

}  // namespace

std::span<const ForwardKernel> forward_kernels() {
  static const std::vector<ForwardKernel> rows = [] {
    const auto hopper = sm90::forward_rows();
    std::vector<ForwardKernel> all(hopper.begin(), hopper.end());
    all.push_back(kForwardSm80);
    return all;
  }();
  return rows;
}
std::span<const BackwardKernel> backward_kernels() { return kBackward; }

}  // namespace adaattn::cuda
