#include "cuda/simt/backward.h"

#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/simt/launch.h"

namespace adaattn::cuda::simt {
namespace {

float* lay_out(const adaattn_backward_args& args, Scratch& scratch) {
  return scratch.take<float>(static_cast<std::size_t>(args.q.shape[0] * args.q.shape[1] * args.q.shape[2]));
}

}  // namespace

Reasons declines_backward(const adaattn_backward_args& args) {
  constexpr std::int64_t kMost = 1 << 30;
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT32, "takes float32 only")
      .unless(args.plans == nullptr && args.tile_classes == nullptr,
              "takes no plans or tile classes: computes the gradients of exact attention only")
      .unless(args.q.shape[3] <= 256 && args.v.shape[3] <= 256, "D and Dv must be at most 256")
      .unless(args.q.shape[2] <= kMost && args.k.shape[2] <= kMost && args.q.shape[0] * args.q.shape[1] <= kMost,
              "too many tokens or heads");
}

std::size_t backward_workspace(const adaattn_backward_args& args) {
  Scratch scratch(nullptr);
  lay_out(args, scratch);
  return scratch.bytes();
}

void backward(const adaattn_backward_args& args) {
  if (!has_elements(args.q) && !has_elements(args.k)) return;
  Scratch scratch(args.workspace);
  BackwardParams params{};
  params.q = make_tensor_view(args.q), params.k = make_tensor_view(args.k), params.v = make_tensor_view(args.v);
  params.out = make_tensor_view(args.out), params.dout = make_tensor_view(args.dout);
  params.dq = make_tensor_view(args.dq), params.dk = make_tensor_view(args.dk), params.dv = make_tensor_view(args.dv);
  params.lse = args.lse;
  params.delta = lay_out(args, scratch);
  params.key_lengths = args.key_lengths;
  params.mask = sm80::make_mask_view(args.mask);
  params.visibility = make_visibility(args.options, args.q.shape[2], args.k.shape[2]);
  params.bottom_right = args.options.alignment == ADAATTN_BOTTOM_RIGHT;
  params.scale = static_cast<float>(scale_of(args));
  params.batch = static_cast<int>(args.q.shape[0]);
  params.heads = static_cast<int>(args.q.shape[1]);
  params.group = static_cast<int>(args.q.shape[1] / args.k.shape[1]);
  params.query_count = static_cast<int>(args.q.shape[2]);
  params.key_count = static_cast<int>(args.k.shape[2]);
  params.dim = static_cast<int>(args.q.shape[3]);
  params.dim_v = static_cast<int>(args.v.shape[3]);
  launch_backward(params, static_cast<cudaStream_t>(args.stream));
}

}  // namespace adaattn::cuda::simt
