#include "cpu/cpu_kernels.h"

#include <hwy/highway.h>

#include <algorithm>
#include <array>

#include "cpu/adaptive.h"
#include "cpu/backward.h"
#include "cpu/backward_tiled.h"
#include "cpu/bounded.h"
#include "cpu/decode.h"
#include "cpu/decode_plan.h"
#include "cpu/forward.h"
#include "cpu/forward_plan.h"
#include "cpu/tile_costs.h"

namespace adaattn::cpu {
namespace {

Reasons always_available() { return {}; }

template <typename Args>
Reasons declines(const Args& args) {
  return Reasons()
      .unless(args.q.shape[3] <= kMaxHeadDim, "head size D is above 256")
      .unless(args.v.shape[3] <= kMaxHeadDim, "head size Dv is above 256");
}

Reasons declines_decode(const adaattn_forward_args& args) {
  const std::int64_t group = args.k.shape[1] != 0 ? args.q.shape[1] / args.k.shape[1] : 0;
  return declines(args).unless(group * args.q.shape[2] <= kMaxDecodeRows, "more than 8 query rows share a key head");
}

bool plans_can_run(const adaattn_forward_args& args) {
  for (std::int64_t h = 0; args.plans != nullptr && h < args.q.shape[0] * args.q.shape[1]; ++h) {
    const adaattn_head_plan& plan = args.plans[h];
    if (plan.form == ADAATTN_LOW_RANK && args.options.causal != 0) return false;
  }
  return true;
}

Reasons declines_adaptive(const adaattn_forward_args& args) {
  // Planning and verification cost about as much as 300 rows of queries. Low precision earns that from 1,024 tokens on,
  // tiles left out alone from 4,096 (measured: docs/decisions/0005-cpu-tiles.md); below, the kernel runs if it is
  // named.
  const Copies copies = paying_copies();
  const std::int64_t least = copies.int8 || copies.bfloat16 ? 1024 : 4096;
  const std::int64_t tokens = std::min(args.q.shape[2], args.k.shape[2]);
  return declines(args)
      .unless(args.options.error > 0, "the budget is 0: exact")
      .unless(args.options.guarantee == ADAATTN_MEASURED, "the error must be bounded, not measured")
      .unless(args.mask.data == nullptr, "takes no mask")
      .unless(plans_can_run(args), "a plan names a low rank under a causal mask")
      .unless(args.options.sinks == 0 && args.options.window_left < 0 && args.options.window_right < 0,
              "takes no window")
      .unless(tokens >= kClassTile, "takes 64 tokens or more")
      .unless(tokens >= 4096 || args.options.error >= 4e-3 || args.options.kernel != nullptr || args.plans != nullptr,
              "a budget below 4e-3 leaves fewer than 4,096 tokens nothing to gain")
      .unless(tokens >= least || args.options.kernel != nullptr, "fewer than 4,096 tokens leave nothing to gain here");
}

Reasons declines_bounded(const adaattn_forward_args& args) {
  return declines(args)
      .unless(args.options.error > 0, "the budget is 0: exact")
      .unless(args.options.guarantee == ADAATTN_BOUNDED, "the error must be measured, not bounded")
      .unless(args.mask.data == nullptr, "takes no mask")
      .unless(args.options.sinks == 0 && args.options.window_left < 0 && args.options.window_right < 0,
              "takes no window");
}

constexpr std::array kForward = {ForwardKernel{.name = "cpu_adaptive",
                                               .summary = "tiles of keys chosen within the error budget, float32",
                                               .device = ADAATTN_CPU,
                                               .unavailable = always_available,
                                               .declines = declines_adaptive,
                                               .workspace = adaptive_workspace,
                                               .run = adaptive},
                                 ForwardKernel{.name = "cpu_bounded",
                                               .summary = "every tile scored, an upper bound on each head's error",
                                               .device = ADAATTN_CPU,
                                               .unavailable = always_available,
                                               .declines = declines_bounded,
                                               .workspace = bounded_workspace,
                                               .run = bounded},
                                 ForwardKernel{.name = "cpu_decode",
                                               .summary = "few query rows in float32, keys split over threads",
                                               .device = ADAATTN_CPU,
                                               .unavailable = always_available,
                                               .declines = declines_decode,
                                               .workspace = decode_workspace,
                                               .run = decode},
                                 ForwardKernel{.name = "cpu_flash",
                                               .summary = "tiled online softmax in float32 on vector units",
                                               .device = ADAATTN_CPU,
                                               .unavailable = always_available,
                                               .declines = declines<adaattn_forward_args>,
                                               .workspace = forward_workspace,
                                               .run = forward}};

Reasons declines_backward(const adaattn_backward_args& args) {
  return declines(args).unless(args.plans == nullptr, "gives the gradient of exact attention, not of given plans");
}

Reasons declines_backward_tiled(const adaattn_backward_args& args) {
  return declines(args)
      .unless(args.plans != nullptr, "needs the plans and tile classes of a forward pass within a budget")
      .unless(args.mask.data == nullptr, "takes no mask")
      .unless(args.options.sinks == 0 && args.options.window_left < 0 && args.options.window_right < 0,
              "takes no window");
}

constexpr std::array kBackward = {BackwardKernel{.name = "cpu_tiled",
                                                 .summary = "gradients of tiles in classes, as they were rounded",
                                                 .device = ADAATTN_CPU,
                                                 .unavailable = always_available,
                                                 .declines = declines_backward_tiled,
                                                 .workspace = backward_tiled_workspace,
                                                 .run = backward_tiled},
                                  BackwardKernel{.name = "cpu_flash",
                                                 .summary = "tiled recomputation in float32 on vector units",
                                                 .device = ADAATTN_CPU,
                                                 .unavailable = always_available,
                                                 .declines = declines_backward,
                                                 .workspace = backward_workspace,
                                                 .run = backward}};

}  // namespace

std::span<const ForwardKernel> forward_kernels() { return kForward; }
std::span<const BackwardKernel> backward_kernels() { return kBackward; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) names.emplace_back(hwy::TargetName(target));
  return names;
}

}  // namespace adaattn::cpu
