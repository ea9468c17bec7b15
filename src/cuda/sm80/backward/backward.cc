#include "cuda/sm80/backward/backward.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/common/check.h"
#include "cuda/sm80/backward/launch.h"

namespace adaattn::cuda::sm80 {
namespace {

// Calls visit with the configuration that the problem takes, as a value of an empty type.
template <typename Visitor>
void with_config(const adaattn_backward_args& args, const Visitor& visit) {
  if (dim_of(args) <= 64)
    visit(BackwardDim64{});
  else if (dim_of(args) <= 128)
    visit(BackwardDim128{});
  else
    visit(BackwardDim256{});
}

struct Arrays {
  float *rows, *dq;
  unsigned* order;
  std::size_t zeroed_bytes;  // from dq on: the sums, and the order's counters
};

template <typename Config>
Arrays lay_out(const adaattn_backward_args& args, Scratch& scratch) {
  const std::size_t heads = static_cast<std::size_t>(args.q.shape[0] * args.q.shape[1]);
  const std::size_t tiles =
      heads * static_cast<std::size_t>((args.q.shape[2] + Config::kQueries - 1) / Config::kQueries);
  Arrays arrays{};
  arrays.rows = scratch.take<float>(tiles * 2 * Config::kQueries);
  const std::size_t before = scratch.bytes();
  arrays.dq = scratch.take<float>(tiles * Config::kQueries * Config::kDim);
  if (args.options.deterministic != 0) arrays.order = scratch.take<unsigned>(1 + tiles);
  arrays.zeroed_bytes = scratch.bytes() - before;
  return arrays;
}

// As many key heads side by side as leave what their queries take (q, dout and the sums for dQ) about half of an A100's
// L2 cache; one where all blocks take the same time, or their order is given.
int heads_at_once(const adaattn_backward_args& args) {
  if (!tiles_differ(args) || args.options.deterministic != 0) return 1;
  constexpr std::int64_t kBytes = 20 << 20;
  const std::int64_t group = args.q.shape[1] / args.k.shape[1];
  const std::int64_t head =
      std::max<std::int64_t>(1, group * args.q.shape[2] * (args.q.shape[3] * 6 + args.v.shape[3] * 2));
  return static_cast<int>(std::clamp<std::int64_t>(kBytes / head, 1, args.k.shape[0] * args.k.shape[1]));
}

template <typename Config>
BackwardParams main_params(const adaattn_backward_args& args, const Arrays& arrays) {
  BackwardParams params{};
  params.q = make_matrix_view(args.q);
  params.k = make_matrix_view(args.k);
  params.v = make_matrix_view(args.v);
  params.dout = make_matrix_view(args.dout);
  params.dk = make_matrix_view(args.dk);
  params.dv = make_matrix_view(args.dv);
  params.rows = arrays.rows;
  params.dq = arrays.dq;
  params.key_lengths = args.key_lengths;
  params.order = arrays.order;
  params.mask = make_mask_view(args.mask);
  params.scale = static_cast<float>(scale_of(args));
  params.scale_log2 = static_cast<float>(scale_of(args) * 1.4426950408889634);
  params.batch = static_cast<int>(args.q.shape[0]);
  params.heads = static_cast<int>(args.q.shape[1]);
  params.group = static_cast<int>(args.q.shape[1] / args.k.shape[1]);
  params.query_count = static_cast<int>(args.q.shape[2]);
  params.key_count = static_cast<int>(args.k.shape[2]);
  params.dim = static_cast<int>(args.q.shape[3]);
  params.dim_v = static_cast<int>(args.v.shape[3]);
  params.visibility = make_visibility(args.options, args.q.shape[2], args.k.shape[2]);
  params.bottom_right = args.options.alignment == ADAATTN_BOTTOM_RIGHT;
  params.key_tiles = (params.key_count + Config::kKeys - 1) / Config::kKeys;
  params.query_tiles = (params.query_count + Config::kQueries - 1) / Config::kQueries;
  params.heads_at_once = heads_at_once(args);
  return params;
}

RowParams row_params(const adaattn_backward_args& args, const BackwardParams& params) {
  RowParams rows{};
  rows.out = make_matrix_view(args.out);
  rows.dout = params.dout;
  rows.dq = make_matrix_view(args.dq);
  rows.lse = args.lse;
  rows.rows = const_cast<float*>(params.rows);
  rows.dq_sums = params.dq;
  rows.scale = params.scale;
  rows.batch = params.batch;
  rows.heads = params.heads;
  rows.query_count = params.query_count;
  rows.query_tiles = params.query_tiles;
  rows.dim = params.dim;
  rows.dim_v = params.dim_v;
  return rows;
}

template <typename T, typename Config>
void launch(const adaattn_backward_args& args, const BackwardParams& params) {
  const RowParams rows = row_params(args, params);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  if (args.mask.data != nullptr)
    launch_backward<T, Config, true>(params, rows, stream);
  else
    launch_backward<T, Config, false>(params, rows, stream);
}

}  // namespace

Reasons declines_backward(const adaattn_backward_args& args) {
  constexpr std::int64_t kMostTokens = 1 << 29, kMostTiles = 1 << 27;
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1], nq = args.q.shape[2], nk = args.k.shape[2];
  const auto multiple_of_8_to_256 = [](std::int64_t dim) { return dim % 8 == 0 && dim <= 256; };
  bool fits = true;
  for (const adaattn_tensor* tensor : {&args.q, &args.k, &args.v, &args.out, &args.dout, &args.dq, &args.dk, &args.dv})
    fits = fits && matrix_view_fits(*tensor);
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT16 || args.q.dtype == ADAATTN_BFLOAT16, "takes float16 and bfloat16 only")
      .unless(args.plans == nullptr && args.tile_classes == nullptr,
              "takes no plans or tile classes: computes the gradients of exact attention only")
      .unless(multiple_of_8_to_256(args.q.shape[3]) && multiple_of_8_to_256(args.v.shape[3]),
              "D and Dv must be multiples of 8, at most 256")
      .unless(fits, "all tensors need a contiguous dim, strides that are multiples of 16 bytes, and data on 16 bytes")
      .unless(nq <= kMostTokens && nk <= kMostTokens && heads <= kMostTiles / (nq / 64 + 1) &&
                  heads <= kMostTiles / (nk / 128 + 1),
              "too many tokens or heads");
}

std::size_t backward_workspace(const adaattn_backward_args& args) {
  Scratch scratch(nullptr);
  with_config(args, [&]<typename Config>(Config) { lay_out<Config>(args, scratch); });
  return scratch.bytes();
}

void backward(const adaattn_backward_args& args) {
  if (!has_elements(args.q) && !has_elements(args.k)) return;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  with_config(args, [&]<typename Config>(Config) {
    Scratch scratch(args.workspace);
    const Arrays arrays = lay_out<Config>(args, scratch);
    const BackwardParams params = main_params<Config>(args, arrays);
    if (arrays.zeroed_bytes > 0) ADAATTN_CUDA_CHECK(cudaMemsetAsync(arrays.dq, 0, arrays.zeroed_bytes, stream));
    if (args.q.dtype == ADAATTN_BFLOAT16)
      launch<__nv_bfloat16, Config>(args, params);
    else
      launch<__half, Config>(args, params);
  });
}

}  // namespace adaattn::cuda::sm80
