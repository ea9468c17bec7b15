#include "reference/reference_kernels.h"

#include <array>
#include <cmath>

#include "common/scratch.h"
#include "common/tensor.h"
#include "reference/reference.h"

namespace adaattn::reference {
namespace {

std::size_t elements(const adaattn_tensor& t) {
  return static_cast<std::size_t>(t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3]);
}

void store(const adaattn_tensor& to, const double* from) {
  for (std::int64_t b = 0; b < to.shape[0]; ++b)
    for (std::int64_t h = 0; h < to.shape[1]; ++h)
      for (std::int64_t n = 0; n < to.shape[2]; ++n)
        for (std::int64_t d = 0; d < to.shape[3]; ++d)
          store_element(to.data, offset_of(to, b, h, n, d), to.dtype, static_cast<float>(*from++));
}

struct ForwardArrays {
  double *out, *lse;
};
ForwardArrays lay_out(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t out = elements(args.out);
  return {.out = scratch.take<double>(out),
          .lse = scratch.take<double>(out / static_cast<std::size_t>(args.out.shape[3]))};
}

struct BackwardArrays {
  double *dq, *dk, *dv;
};
BackwardArrays lay_out(const adaattn_backward_args& args, Scratch& scratch) {
  return {.dq = scratch.take<double>(elements(args.dq)),
          .dk = scratch.take<double>(elements(args.dk)),
          .dv = scratch.take<double>(elements(args.dv))};
}

template <typename Args>
std::size_t workspace(const Args& args) {
  Scratch scratch(nullptr);
  lay_out(args, scratch);
  return scratch.bytes();
}

void run_forward(const adaattn_forward_args& args) {
  Scratch scratch(args.workspace);
  const ForwardArrays arrays = lay_out(args, scratch);
  forward(args, arrays.out, arrays.lse);
  store(args.out, arrays.out);
  if (args.lse != nullptr)
    for (std::size_t i = 0; i < elements(args.out) / static_cast<std::size_t>(args.out.shape[3]); ++i)
      args.lse[i] = static_cast<float>(arrays.lse[i]);
  if (args.entropy != nullptr || args.max_probability != nullptr) statistics(args, args.entropy, args.max_probability);
}

void run_backward(const adaattn_backward_args& args) {
  Scratch scratch(args.workspace);
  const BackwardArrays arrays = lay_out(args, scratch);
  backward(args, arrays.dq, arrays.dk, arrays.dv);
  store(args.dq, arrays.dq);
  store(args.dk, arrays.dk);
  store(args.dv, arrays.dv);
}

Reasons always_available() { return {}; }

Reasons declines_plans(const adaattn_backward_args& args) {
  return Reasons().unless(args.plans == nullptr, "gives the gradient of exact attention, not of given plans");
}

constexpr std::array kForward = {ForwardKernel{.name = "reference_fp64",
                                               .summary = "plain FP64 attention, slow; any head size",
                                               .device = ADAATTN_CPU,
                                               .unavailable = always_available,
                                               .declines = [](const adaattn_forward_args&) { return Reasons(); },
                                               .workspace = workspace<adaattn_forward_args>,
                                               .run = run_forward}};

constexpr std::array kBackward = {BackwardKernel{.name = "reference_fp64",
                                                 .summary = "plain FP64 gradients, slow; any head size",
                                                 .device = ADAATTN_CPU,
                                                 .unavailable = always_available,
                                                 .declines = declines_plans,
                                                 .workspace = workspace<adaattn_backward_args>,
                                                 .run = run_backward}};

}  // namespace

std::span<const ForwardKernel> forward_kernels() { return kForward; }
std::span<const BackwardKernel> backward_kernels() { return kBackward; }

}  // namespace adaattn::reference
