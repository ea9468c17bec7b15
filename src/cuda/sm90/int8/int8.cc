#include "cuda/sm90/int8/int8.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/forward/grid.h"
#include "cuda/sm90/int8/launch.h"
#include "cuda/sm90/int8/prepare.h"

namespace adaattn::cuda::sm90 {
namespace {

using Args = adaattn_forward_args;
constexpr char kName[] = "sm90_int8";

// Calls visit with the instance for the head size.
template <typename Visitor>
void with_config(const Args& args, const Visitor& visit) {
  if (dim_of(args) <= 64) return visit(Int8Dim64{});
  visit(Int8Dim128{});
}

// What the workspace holds.
struct Int8Arrays {
  unsigned* next_item;
  float* key_mean;
  std::uint8_t* k8;
  KeyTile* tiles;
  std::uint16_t* v16;  // null: values are bfloat16 already
};

template <typename Config>
int padded_keys_of(const Args& args) {
  return std::max(1, divide_up(static_cast<int>(args.k.shape[2]), Config::kKeys)) * Config::kKeys;
}

template <typename Config>
Int8Arrays lay_out(const Args& args, Scratch& scratch) {
  const auto key_heads = static_cast<std::size_t>(args.k.shape[0] * args.k.shape[1]);
  const std::size_t keys = key_heads * static_cast<std::size_t>(padded_keys_of<Config>(args));
  const adaattn_tensor& v = args.v;
  Int8Arrays arrays{};
  arrays.next_item = scratch.take<unsigned>(1);
  arrays.key_mean = scratch.take<float>(key_heads * Config::kDim);
  arrays.k8 = scratch.take<std::uint8_t>(keys * Config::kDim);
  arrays.tiles = scratch.take<KeyTile>(keys / Config::kKeys);
  if (v.dtype == ADAATTN_FLOAT16)
    arrays.v16 =
        scratch.take<std::uint16_t>(static_cast<std::size_t>(v.shape[0] * v.shape[1] * v.shape[2] * v.shape[3]));
  return arrays;
}

RowsView view_of(const adaattn_tensor& t) {
  RowsView view{.data = static_cast<const std::uint16_t*>(t.data),
                .stride = {},
                .heads = static_cast<int>(t.shape[1]),
                .tokens = static_cast<int>(t.shape[2]),
                .dim = static_cast<int>(t.shape[3])};
  std::copy_n(t.stride, 3, view.stride);
  return view;
}

// A scale of 0 becomes the least normal number: it makes all scores alike.
float scale_log2_of(const Args& args) {
  return std::max(static_cast<float>(scale_of(args) * 1.4426950408889634), FLT_MIN);
}

template <typename Config>
void launch(const Args& args) {
  const Device device = current_device();
  const TileGrid grid = make_grid<Config>(args, device.multiprocessors);
  Scratch scratch(args.workspace);
  const Int8Arrays arrays = lay_out<Config>(args, scratch);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const int padded_keys = padded_keys_of<Config>(args);
  const bool bfloat16 = args.q.dtype == ADAATTN_BFLOAT16;
  launch_prepare({.k = view_of(args.k),
                  .v = view_of(args.v),
                  .batch = grid.batch,
                  .key_lengths = args.key_lengths,
                  .padded_keys = padded_keys,
                  .dim = Config::kDim,
                  .bfloat16 = bfloat16,
                  .key_mean = arrays.key_mean,
                  .k8 = arrays.k8,
                  .tiles = arrays.tiles,
                  .v16 = arrays.v16},
                 stream);

  adaattn_tensor v = args.v;
  if (arrays.v16 != nullptr) {
    v.data = arrays.v16;
    v.dtype = ADAATTN_BFLOAT16;
    v.stride[3] = 1, v.stride[2] = v.shape[3], v.stride[1] = v.shape[2] * v.stride[2];
    v.stride[0] = v.shape[1] * v.stride[1];
  }
  Int8Params params{};
  params.k = make_byte_map(arrays.k8, args.k.shape[0] * args.k.shape[1] * padded_keys, Config::kDim, Config::kKeys,
                           Config::kDim);
  params.v = make_tensor_map(v, Config::kKeys);
  params.grid = grid;
  params.q = static_cast<const std::uint16_t*>(args.q.data);
  std::copy_n(args.q.stride, 3, params.q_stride);
  params.dim_qk = static_cast<int>(args.q.shape[3]), params.dim_v = static_cast<int>(args.v.shape[3]);
  params.padded_keys = padded_keys;
  params.bfloat16 = bfloat16;
  params.scale_log2 = scale_log2_of(args);
  params.tiles = arrays.tiles, params.key_mean = arrays.key_mean;
  params.out = args.out.data;
  std::copy_n(args.out.stride, 3, params.out_stride);
  params.lse = args.lse;
  const int items = item_count(grid), blocks = std::min(items, device.multiprocessors);
  if (blocks < items && tiles_differ(args)) {
    params.next_item = arrays.next_item;
    ADAATTN_CUDA_CHECK(cudaMemsetAsync(params.next_item, 0, sizeof(*params.next_item), stream));
  }
  launch_int8<Config>(params, {.device = device.index, .blocks = blocks, .stream = stream});
}

std::size_t workspace(const Args& args) {
  if (!has_elements(args.out)) return 0;
  Scratch scratch(nullptr);
  with_config(args, [&]<typename Config>(Config) { lay_out<Config>(args, scratch); });
  return scratch.bytes();
}

void run(const Args& args) {
  if (has_elements(args.out)) with_config(args, [&]<typename Config>(Config) { launch<Config>(args); });
}

Reasons declines(const Args& args) {
  constexpr std::int64_t kMostTokens = 1 << 24, kMostRows = 1 << 30;
  const adaattn_options& o = args.options;
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1];
  const auto multiple_of_8_to_128 = [](std::int64_t dim) { return dim % 8 == 0 && dim <= 128; };
  return Reasons()
      .unless(o.kernel != nullptr && std::strcmp(o.kernel, kName) == 0, "runs only when it is named")
      .unless(args.q.dtype == ADAATTN_FLOAT16 || args.q.dtype == ADAATTN_BFLOAT16, "takes float16 and bfloat16 only")
      .unless(multiple_of_8_to_128(args.q.shape[3]) && multiple_of_8_to_128(args.v.shape[3]),
              "D and Dv must be multiples of 8, at most 128")
      .unless(
          tensor_map_fits(args.q) && tensor_map_fits(args.k) && tensor_map_fits(args.v) && tensor_map_fits(args.out),
          "q, k, v and out need a contiguous dim, positive strides that are multiples of 16 bytes, and data on 16 "
          "bytes")
      .unless(args.q.shape[2] <= kMostTokens && args.k.shape[2] <= kMostTokens &&
                  heads * (std::max(args.q.shape[2], args.k.shape[2]) + 512) <= kMostRows,
              "too many tokens or heads")
      .unless(args.mask.data == nullptr && args.entropy == nullptr && args.max_probability == nullptr,
              "takes no mask tensor and computes neither entropy nor max_probability")
      .unless(o.has_scale == 0 || o.scale >= 0, "takes no negative scale");
}

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

constexpr std::array kRows = {ForwardKernel{
    .name = kName,
    .summary =
        "not exact: 8-bit scores and 16-bit values on Hopper tensor cores, error about 1.3e-2; D in steps of 8 to 128",
    .device = ADAATTN_CUDA,
    .unavailable = needs_sm90,
    .declines = declines,
    .workspace = workspace,
    .run = run}};

}  // namespace

std::span<const ForwardKernel> int8_rows() { return kRows; }

}  // namespace adaattn::cuda::sm90
