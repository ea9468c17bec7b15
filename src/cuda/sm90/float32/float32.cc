#include "cuda/sm90/float32/float32.h"

#include <algorithm>
#include <array>
#include <cfloat>

#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"
#include "cuda/simt/forward.h"
#include "cuda/sm90/float32/split.h"
#include "cuda/sm90/float32/tiles.h"
#include "cuda/sm90/forward/grid.h"

namespace adaattn::cuda::sm90 {
namespace {

using Args = adaattn_forward_args;

std::int64_t count_of(const adaattn_tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3]; }

std::int64_t padded_dim_of(const Args& args) { return dim_of(args) <= 64 ? 64 : 128; }

// A tensor's two terms, side by side in the rows of a contiguous one.
adaattn_tensor terms_of(const adaattn_tensor& tensor, std::int64_t padded_dim, Scratch& scratch) {
  adaattn_tensor terms = tensor;
  terms.dtype = ADAATTN_BFLOAT16;
  terms.shape[3] = 2 * padded_dim;
  terms.stride[3] = 1;
  for (int axis = 2; axis >= 0; --axis) terms.stride[axis] = terms.stride[axis + 1] * terms.shape[axis + 1];
  terms.data = scratch.take<std::uint16_t>(static_cast<std::size_t>(count_of(terms)));
  return terms;
}

// What the workspace holds.
struct Counters {
  unsigned next_item, not_split;
};
struct Float32Arrays {
  Counters* counters;
  adaattn_tensor q, k, v;
};

Float32Arrays lay_out(const Args& args, Scratch& scratch) {
  const std::int64_t dim = padded_dim_of(args);
  Float32Arrays arrays{};
  arrays.counters = scratch.take<Counters>(1);
  arrays.q = terms_of(args.q, dim, scratch);
  arrays.k = terms_of(args.k, dim, scratch);
  arrays.v = terms_of(args.v, dim, scratch);
  return arrays;
}

SplitTensor split_of(const adaattn_tensor& from, const adaattn_tensor& to, const std::int64_t* lengths) {
  SplitTensor split{};
  split.from = static_cast<const float*>(from.data);
  std::copy_n(from.stride, 3, split.stride);
  split.to = to.data;
  split.heads = static_cast<int>(from.shape[1]);
  split.tokens = static_cast<int>(from.shape[2]);
  split.dim = static_cast<int>(from.shape[3]);
  split.rows = from.shape[0] * from.shape[1] * from.shape[2];
  split.lengths = lengths;
  return split;
}

template <typename Config>
void launch(const Args& args) {
  const Device device = current_device();
  const auto stream = static_cast<cudaStream_t>(args.stream);
  Scratch scratch(args.workspace);
  const Float32Arrays arrays = lay_out(args, scratch);
  ADAATTN_CUDA_CHECK(cudaMemsetAsync(arrays.counters, 0, sizeof(Counters), stream));
  launch_split({.tensors = {split_of(args.q, arrays.q, nullptr), split_of(args.k, arrays.k, args.key_lengths),
                            split_of(args.v, arrays.v, args.key_lengths)},
                .padded_dim = static_cast<int>(padded_dim_of(args)),
                .not_split = &arrays.counters->not_split},
               device.multiprocessors, stream);

  Args terms = args;
  terms.q = arrays.q, terms.k = arrays.k, terms.v = arrays.v;
  ForwardParams params{};
  params.grid = make_grid<Config>(terms, device.multiprocessors);
  params.q = make_tensor_map(terms.q, Config::kQueries / Config::kQueryParts);
  // Without keys no block of them is ever copied, but the kernel's parameters need some map.
  params.k = count_of(args.k) > 0 ? make_tensor_map(terms.k, Config::kKeys) : params.q;
  params.v = count_of(args.k) > 0 ? make_tensor_map(terms.v, Config::kKeys) : params.q;
  params.out = args.out.data;
  std::copy_n(args.out.stride, 3, params.out_stride);
  params.lse = args.lse;
  // A scale of 0 becomes the least normal number: it makes all scores alike, and those of hidden keys stay -inf.
  params.scale_log2 = std::max(static_cast<float>(scale_of(args) * 1.4426950408889634), FLT_MIN);
  params.dim_v = static_cast<int>(args.v.shape[3]);
  const int items = item_count(params.grid), blocks = std::min(items, device.multiprocessors * Config::kBlocks);
  if (tiles_differ(args) && blocks < items) params.next_item = &arrays.counters->next_item;
  launch_forward<float, Config>(params, {.device = device.index, .blocks = blocks, .stream = stream});

  simt::ForwardParams again = simt::make_params(args);
  again.only_if = &arrays.counters->not_split;
  simt::launch_forward(again, stream);
}

void run(const Args& args) {
  if (count_of(args.out) == 0) return;
  if (padded_dim_of(args) == 64)
    launch<Float64>(args);
  else
    launch<Float128>(args);
}

std::size_t workspace(const Args& args) {
  if (count_of(args.out) == 0) return 0;
  Scratch scratch(nullptr);
  lay_out(args, scratch);
  return scratch.bytes();
}

// Whether rows can be read, or written, in pieces of 16 bytes.
bool has_whole_pieces(const adaattn_tensor& tensor) {
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) return false;
  if (tensor.stride[3] != 1 && tensor.shape[3] != 1) return false;
  for (int axis = 0; axis < 3; ++axis)
    if (tensor.shape[axis] > 1 && tensor.stride[axis] % 4 != 0) return false;
  return true;
}

Reasons declines(const Args& args) {
  constexpr std::int64_t kMostTokens = 1 << 30, kMostRows = std::int64_t{1} << 31;
  const auto rows = [](const adaattn_tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2]; };
  const auto multiple_of_8_to_128 = [](std::int64_t dim) { return dim % 8 == 0 && dim <= 128; };
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT32, "takes float32 only")
      .unless(multiple_of_8_to_128(args.q.shape[3]) && multiple_of_8_to_128(args.v.shape[3]),
              "D and Dv must be multiples of 8, at most 128")
      .unless(has_whole_pieces(args.q) && has_whole_pieces(args.k) && has_whole_pieces(args.v) &&
                  has_whole_pieces(args.out),
              "q, k, v and out need a contiguous dim, strides that are multiples of 16 bytes, and data on 16 bytes")
      .unless(args.mask.data == nullptr, "takes no mask tensor")
      .unless(args.entropy == nullptr && args.max_probability == nullptr,
              "computes neither entropy nor max_probability")
      .unless(scale_of(args) >= 0, "takes no negative scale")
      .unless(args.q.shape[2] <= kMostTokens && args.k.shape[2] <= kMostTokens && rows(args.q) < kMostRows &&
                  rows(args.k) < kMostRows,
              "too many tokens or heads");
}

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

constexpr std::array kRows = {
    ForwardKernel{.name = "sm90_float32",
                  .summary = "float32 as three bfloat16 products on Hopper tensor cores; D in steps of 8 to 128",
                  .device = ADAATTN_CUDA,
                  .unavailable = needs_sm90,
                  .declines = declines,
                  .workspace = workspace,
                  .run = run}};

}  // namespace

std::span<const ForwardKernel> float32_rows() { return kRows; }

}  // namespace adaattn::cuda::sm90
