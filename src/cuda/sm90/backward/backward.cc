#include "cuda/sm90/backward/backward.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/common/check.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/backward/launch.h"

namespace adaattn::cuda::sm90 {
namespace {

// From so many queries on a key head on, the forms whose consumers do not meet are faster (docs/performance.md).
bool has_many_queries(const adaattn_backward_args& args) {
  constexpr std::int64_t kFewestQueries = 2048;
  const bool one_block = args.k.shape[2] <= SplitDim64::kKeys;
  return !one_block &&
         args.q.shape[2] * (args.q.shape[1] / std::max<std::int64_t>(1, args.k.shape[1])) >= kFewestQueries;
}

// Calls visit with the configuration that the problem takes, as a value of an empty type.
template <typename Visitor>
void with_config(const adaattn_backward_args& args, const Visitor& visit) {
  const auto with_order = [&]<bool kOrdered>() {
    if (dim_of(args) <= 64)
      visit(BackwardDim64<kOrdered>{});
    else
      visit(BackwardDim128<kOrdered>{});
  };
  if (args.options.deterministic != 0)
    with_order.template operator()<true>();
  else if (!has_many_queries(args))
    with_order.template operator()<false>();
  else if (dim_of(args) <= 64)
    visit(SplitDim64{});
  else if (tiles_differ(args))
    visit(LateDim128<true>{});
  else
    visit(LateDim128<false>{});
}

// Whether one block of 128 keys makes all of dQ, and each tile of it.
bool is_one_block(const adaattn_backward_args& args) {
  const std::int64_t key_count = args.k.shape[2];
  const Visibility visibility = make_visibility(args.options, args.q.shape[2], key_count);
  return key_count > 0 && key_count <= 128 && args.key_lengths == nullptr && visibility.left == kUnlimited &&
         visibility.diagonal + visibility.right >= 0;
}

struct Arrays {
  float *rows, *sums;
  unsigned* order;
  std::size_t order_bytes;
};

template <typename Config>
Arrays lay_out(const adaattn_backward_args& args, Scratch& scratch) {
  const std::size_t heads = static_cast<std::size_t>(args.q.shape[0] * args.q.shape[1]);
  const std::size_t tiles =
      heads * static_cast<std::size_t>((args.q.shape[2] + Config::kQueries - 1) / Config::kQueries);
  Arrays arrays{};
  arrays.rows = scratch.take<float>(tiles * 2 * Config::kQueries);
  arrays.sums = scratch.take<float>(tiles * Config::kQueries * Config::kDim);
  if (Config::kOrdered) {
    arrays.order = scratch.take<unsigned>(1 + 2 * tiles);
    arrays.order_bytes = (1 + 2 * tiles) * sizeof(unsigned);
  }
  return arrays;
}

// Whether key heads are worked on side by side. Where blocks take different times, so that the longest ones come first.
// In a deterministic order it is the other way round (docs/performance.md): blocks of one head that all visit the same
// tiles of queries would follow each other a fraction of a step apart, each waiting for the one before it, while those
// that differ start apart anyway. At head sizes over 64 a few short heads wait less than what more of them cost.
bool is_side_by_side(const adaattn_backward_args& args, std::int64_t queries) {
  constexpr std::int64_t kFewestOrderedQueries = 1024;
  if (args.options.deterministic == 0) return tiles_differ(args);
  return !tiles_differ(args) && (dim_of(args) <= 64 || queries >= kFewestOrderedQueries);
}

// As many key heads side by side as leave what their queries take (q, dout and the sums for dQ) about half of the L2
// cache (50 to 60 MB), or one.
int heads_at_once(const adaattn_backward_args& args) {
  constexpr std::int64_t kBytes = 24 << 20;
  const std::int64_t group = args.q.shape[1] / args.k.shape[1];
  const std::int64_t queries = group * args.q.shape[2];
  if (!is_side_by_side(args, queries)) return 1;
  const std::int64_t head = std::max<std::int64_t>(1, queries * (args.q.shape[3] * 6 + args.v.shape[3] * 2));
  return static_cast<int>(std::clamp<std::int64_t>(kBytes / head, 1, args.k.shape[0] * args.k.shape[1]));
}

template <typename Config>
BackwardParams params_of(const adaattn_backward_args& args, const Arrays& arrays) {
  BackwardParams params{};
  // Without queries or keys no block of them is ever copied, but the kernel's parameters need some map.
  const adaattn_tensor& some = has_elements(args.q) ? args.q : args.k;
  const auto map = [&](const adaattn_tensor& tensor, int rows) {
    return make_tensor_map(has_elements(tensor) ? tensor : some, rows);
  };
  params.q = map(args.q, Config::kQueries);
  params.k = map(args.k, Config::kKeys);
  params.v = map(args.v, Config::kKeys);
  params.dout_blocks = map(args.dout, Config::kQueries);
  params.out = args.out.data;
  params.dout = args.dout.data;
  std::copy_n(args.out.stride, 3, params.out_stride);
  std::copy_n(args.dout.stride, 3, params.dout_stride);
  params.lse = args.lse;
  params.rows = arrays.rows;
  params.sums = arrays.sums;
  params.dq = args.dq.data;
  params.dk = args.dk.data;
  params.dv = args.dv.data;
  std::copy_n(args.dq.stride, 3, params.dq_stride);
  std::copy_n(args.dk.stride, 3, params.dk_stride);
  std::copy_n(args.dv.stride, 3, params.dv_stride);
  params.key_lengths = args.key_lengths;
  params.order = arrays.order;
  params.adds = !is_one_block(args);
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

}  // namespace

Reasons declines_backward(const adaattn_backward_args& args) {
  constexpr std::int64_t kMostTokens = 1 << 30, kMostTiles = 1 << 29;
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1], nq = args.q.shape[2], nk = args.k.shape[2];
  const auto multiple_of_8_to_128 = [](std::int64_t dim) { return dim % 8 == 0 && dim <= 128; };
  bool fits = true;
  for (const adaattn_tensor* tensor : {&args.q, &args.k, &args.v, &args.out, &args.dout, &args.dq, &args.dk, &args.dv})
    fits = fits && tensor_map_fits(*tensor);
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT16 || args.q.dtype == ADAATTN_BFLOAT16, "takes float16 and bfloat16 only")
      .unless(args.mask.data == nullptr, "takes no mask tensor")
      .unless(args.plans == nullptr && args.tile_classes == nullptr,
              "takes no plans or tile classes: computes the gradients of exact attention only")
      .unless(multiple_of_8_to_128(args.q.shape[3]) && multiple_of_8_to_128(args.v.shape[3]),
              "D and Dv must be multiples of 8, at most 128")
      .unless(
          fits,
          "all tensors need a contiguous dim, positive strides that are multiples of 16 bytes, and data on 16 bytes")
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
    const BackwardParams params = params_of<Config>(args, arrays);
    if (Config::kOrdered) ADAATTN_CUDA_CHECK(cudaMemsetAsync(arrays.order, 0, arrays.order_bytes, stream));
    if (args.q.dtype == ADAATTN_BFLOAT16)
      launch_backward<__nv_bfloat16, Config>(params, stream);
    else
      launch_backward<__half, Config>(params, stream);
  });
}

}  // namespace adaattn::cuda::sm90
