#include "cuda/sm80/forward/forward.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/common/call.h"
#include "cuda/sm80/forward/launch.h"

namespace adaattn::cuda::sm80 {
namespace {

float scale_log2_of(const adaattn_forward_args& args) {
  return static_cast<float>(scale_of(args) * 1.4426950408889634);
}

// The plain kernel takes maxima of scores before they are scaled, and scales the -inf of hidden keys.
bool is_general(const adaattn_forward_args& args) {
  return args.mask.data != nullptr || args.entropy != nullptr || args.max_probability != nullptr ||
         !(scale_log2_of(args) > 0);
}

// As many heads side by side as leave their keys and values about half of an A100's L2 cache; one where all tiles take
// the same time and order does not matter.
int heads_at_once(const adaattn_forward_args& args) {
  if (!tiles_differ(args)) return 1;
  constexpr std::int64_t kBytes = 20 << 20;
  const std::int64_t head = std::max<std::int64_t>(1, args.k.shape[2] * (args.k.shape[3] + args.v.shape[3]) * 2);
  const std::int64_t key_heads = std::clamp<std::int64_t>(kBytes / head, 1, args.k.shape[0] * args.k.shape[1]);
  return static_cast<int>(key_heads * (args.q.shape[1] / args.k.shape[1]));
}

template <typename T, typename Config>
void launch(ForwardParams& params, const adaattn_forward_args& args) {
  params.tiles_per_head = (params.query_count + Config::kQueries - 1) / Config::kQueries;
  const int blocks = params.batch * params.heads * params.tiles_per_head;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  if (is_general(args))
    launch_forward<T, Config, true>(params, blocks, stream);
  else
    launch_forward<T, Config, false>(params, blocks, stream);
}

template <typename T>
void launch_for_dim(ForwardParams& params, const adaattn_forward_args& args) {
  const std::int64_t dim = dim_of(args);
  if (dim <= 64) return launch<T, Dim64>(params, args);
  if (dim <= 128) return launch<T, Dim128>(params, args);
  launch<T, Dim256>(params, args);
}

}  // namespace

Reasons declines_forward(const adaattn_forward_args& args) {
  constexpr std::int64_t kMostTokens = 1 << 30, kMostTiles = 1 << 30;
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1], nq = args.q.shape[2], nk = args.k.shape[2];
  const auto multiple_of_8_to_256 = [](std::int64_t dim) { return dim % 8 == 0 && dim <= 256; };
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT16 || args.q.dtype == ADAATTN_BFLOAT16, "takes float16 and bfloat16 only")
      .unless(multiple_of_8_to_256(args.q.shape[3]) && multiple_of_8_to_256(args.v.shape[3]),
              "D and Dv must be multiples of 8, at most 256")
      .unless(matrix_view_fits(args.q) && matrix_view_fits(args.k) && matrix_view_fits(args.v) &&
                  matrix_view_fits(args.out),
              "q, k, v and out need a contiguous dim, strides that are multiples of 16 bytes, and data on 16 bytes")
      .unless(nq <= kMostTokens && nk <= kMostTokens && heads <= kMostTiles / (nq / 64 + 1),
              "too many tokens or heads");
}

std::size_t forward_workspace(const adaattn_forward_args&) { return 0; }

void forward(const adaattn_forward_args& args) {
  if (!has_elements(args.out)) return;
  ForwardParams params{};
  params.q = make_matrix_view(args.q);
  params.k = make_matrix_view(args.k);
  params.v = make_matrix_view(args.v);
  params.out = make_matrix_view(args.out);
  params.lse = args.lse;
  params.entropy = args.entropy;
  params.max_probability = args.max_probability;
  params.key_lengths = args.key_lengths;
  params.mask = make_mask_view(args.mask);
  params.scale_log2 = scale_log2_of(args);
  params.batch = static_cast<int>(args.q.shape[0]);
  params.heads = static_cast<int>(args.q.shape[1]);
  params.group = static_cast<int>(args.q.shape[1] / args.k.shape[1]);
  params.query_count = static_cast<int>(args.q.shape[2]);
  params.key_count = static_cast<int>(args.k.shape[2]);
  params.dim = static_cast<int>(args.q.shape[3]);
  params.dim_v = static_cast<int>(args.v.shape[3]);
  params.visibility = make_visibility(args.options, args.q.shape[2], args.k.shape[2]);
  params.bottom_right = args.options.alignment == ADAATTN_BOTTOM_RIGHT;
  params.heads_at_once = heads_at_once(args);
  if (args.q.dtype == ADAATTN_BFLOAT16)
    launch_for_dim<__nv_bfloat16>(params, args);
  else
    launch_for_dim<__half>(params, args);
}

}  // namespace adaattn::cuda::sm80
