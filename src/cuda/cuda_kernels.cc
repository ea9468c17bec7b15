// The CUDA rows of the implementation table.
#include "cuda/cuda_kernels.h"

#include <array>
#include <vector>

#include "cuda/common/device.h"
#include "cuda/simt/backward.h"
#include "cuda/simt/forward.h"
#include "cuda/sm80/backward/backward.h"
#include "cuda/sm80/forward/forward.h"
#include "cuda/sm90/adaptive/adaptive.h"
#include "cuda/sm90/backward/backward.h"
#include "cuda/sm90/float32/float32.h"
#include "cuda/sm90/forward/forward.h"
#include "cuda/sm90/int8/int8.h"

namespace adaattn::cuda {
namespace {

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

Reasons needs_sm80() {
  return Reasons().unless(current_device_is(80) || current_device_is(90),
                          "needs a current device of compute capability 8.0 or 9.0 (A100, H100, H200)");
}

Reasons needs_any() {
  return Reasons().unless(current_device_reaches(80), "needs a current device of compute capability 8.0 or later");
}

constexpr ForwardKernel kForwardSimt = {
    .name = "simt_float32",
    .summary = "exact, float32 on ordinary cores; D to 256, any strides, masks, statistics",
    .device = ADAATTN_CUDA,
    .unavailable = needs_any,
    .declines = simt::declines_forward,
    .workspace = simt::forward_workspace,
    .run = simt::forward};

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
                   .summary = "exact, float16 and bfloat16 on tensor cores; D in steps of 8 to 256, masks",
                   .device = ADAATTN_CUDA,
                   .unavailable = needs_sm80,
                   .declines = sm80::declines_backward,
                   .workspace = sm80::backward_workspace,
                   .run = sm80::backward},
    BackwardKernel{.name = "simt_float32",
                   .summary = "exact, float32 on ordinary cores; D to 256, any strides, masks",
                   .device = ADAATTN_CUDA,
                   .unavailable = needs_any,
                   .declines = simt::declines_backward,
                   .workspace = simt::backward_workspace,
                   .run = simt::backward}};

}  // namespace

std::span<const ForwardKernel> forward_kernels() {
  static const std::vector<ForwardKernel> rows = [] {
    const auto adaptive = sm90::adaptive_rows();  // before the exact ones, which meet every budget, too
    std::vector<ForwardKernel> all(adaptive.begin(), adaptive.end());
    const auto hopper = sm90::forward_rows();
    all.insert(all.end(), hopper.begin(), hopper.end());
    all.push_back(kForwardSm80);
    const auto hopper_float32 = sm90::float32_rows();
    all.insert(all.end(), hopper_float32.begin(), hopper_float32.end());
    all.push_back(kForwardSimt);
    const auto bytes = sm90::int8_rows();
    all.insert(all.end(), bytes.begin(), bytes.end());
    return all;
  }();
  return rows;
}
std::span<const BackwardKernel> backward_kernels() { return kBackward; }

}  // namespace adaattn::cuda
