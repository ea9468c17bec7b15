#include "cuda/simt/forward.h"

#include "cuda/common/call.h"

namespace adaattn::cuda::simt {

Reasons declines_forward(const adaattn_forward_args& args) {
  constexpr std::int64_t kMost = 1 << 30;
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT32, "takes float32 only")
      .unless(args.q.shape[3] <= 256 && args.v.shape[3] <= 256, "D and Dv must be at most 256")
      .unless(args.q.shape[2] <= kMost && args.k.shape[2] <= kMost && args.q.shape[0] * args.q.shape[1] <= kMost,
              "too many tokens or heads");
}

std::size_t forward_workspace(const adaattn_forward_args&) { return 0; }

ForwardParams make_params(const adaattn_forward_args& args) {
  ForwardParams params{};
  params.q = make_tensor_view(args.q), params.k = make_tensor_view(args.k), params.v = make_tensor_view(args.v);
  params.out = make_tensor_view(args.out);
  params.lse = args.lse, params.entropy = args.entropy, params.max_probability = args.max_probability;
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
  return params;
}

void forward(const adaattn_forward_args& args) {
  if (!has_elements(args.out)) return;
  launch_forward(make_params(args), static_cast<cudaStream_t>(args.stream));
}

}  // namespace adaattn::cuda::simt
