#include "cuda/sm90/forward/forward.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cstring>
#include <type_traits>

#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/forward/grid.h"
#include "cuda/sm90/forward/launch.h"
#include "cuda/sm90/forward/listed.h"

namespace adaattn::cuda::sm90 {
namespace {

using Args = adaattn_forward_args;

// Up to so many keys a row smaller steps pay (docs/performance.md): more where the diagonal or a window's edge cuts
// steps.
struct FineKeys {
  std::int64_t whole, at_edges;
};
constexpr FineKeys kFine64{.whole = 1024, .at_edges = 2048}, kFine128{.whole = 0, .at_edges = 4096},
    kFineHalf{.whole = 1024, .at_edges = 4096};
// Up to so many queries and keys one tile of Dim64 takes a head in one step, and finer ones would waste half their
// rows.
constexpr std::int64_t kOneStep64 = 128;

// Each use of the kernel, by a function that calls visit with the configuration that a problem of elements T takes.
template <typename Config64, typename Config128, typename Config256>
struct ByHeadSize {
  template <typename T, typename Visitor>
  static void with_config(const Args& args, const Visitor& visit) {
    const std::int64_t dim = dim_of(args);
    if (dim <= 64) return visit(Config64{});
    if (dim > 128) return visit(Config256{});
    visit(Config128{});
  }
};
struct Few : ByHeadSize<Few64, Few128, Few256> {
  static constexpr char kName[] = "sm90_few_rows";
};
struct Short : ByHeadSize<Short64, Short128, Short128> {
  static constexpr char kName[] = "sm90_short";
};
struct Any : ByHeadSize<Any64, Any128, Any256> {
  static constexpr char kName[] = "sm90_masks";
};

// Keys that a row sees at most.
std::int64_t keys_in_sight(const Args& args) {
  const adaattn_options& o = args.options;
  const std::int64_t all = args.k.shape[2];
  const bool bounded = o.window_left >= 0 && (o.causal != 0 || o.window_right >= 0);
  return bounded ? std::min(all, o.window_left + std::max<std::int64_t>(o.window_right, 0) + 1) : all;
}

struct Usual {
  static constexpr char kName[] = "sm90_forward";
  template <typename T, typename Visitor>
  static void with_config(const Args& args, const Visitor& visit) {
    const std::int64_t dim = dim_of(args);
    if (dim > 128) return visit(Dim256{});
    const std::int64_t keys = keys_in_sight(args);
    const auto fine = [&](FineKeys most) { return keys <= (tiles_differ(args) ? most.at_edges : most.whole); };
    if constexpr (std::is_same_v<T, __half>) {
      if (dim <= 64) return visit(Half64{});
      return fine(kFineHalf) ? visit(Half128Fine{}) : visit(Half128{});
    } else {
      const bool one_step = std::max(args.q.shape[2], args.k.shape[2]) <= kOneStep64;
      if (dim <= 64) return fine(kFine64) && !one_step ? visit(Dim64Fine{}) : visit(Dim64{});
      return fine(kFine128) ? visit(Dim128Fine{}) : visit(Dim128{});
    }
  }
};

// Calls visit with the element type and the configuration.
template <typename Use, typename Visitor>
void with_instance(const Args& args, const Visitor& visit) {
  const auto of_element = [&]<typename T>(T element) {
    Use::template with_config<T>(args, [&]<typename Config>(Config config) { visit(element, config); });
  };
  args.q.dtype == ADAATTN_BFLOAT16 ? of_element(__nv_bfloat16{}) : of_element(__half{});
}

MaskView view_of(const adaattn_tensor& mask, std::int32_t dtype) {
  MaskView view{};
  if (mask.data == nullptr) return view;
  view.data = mask.data;
  for (int axis = 0; axis < 4; ++axis) view.stride[axis] = mask.shape[axis] == 1 ? 0 : mask.stride[axis];
  view.kind = mask.dtype == ADAATTN_BOOL ? MaskView::kBool
              : mask.dtype == dtype      ? MaskView::kElement
                                         : MaskView::kFloat;
  return view;
}

template <typename Config>
ForwardParams make_params(const Args& args, const TileGrid& grid) {
  ForwardParams params{};
  params.grid = grid;
  if constexpr (Config::kPacks)
    params.q = make_packed_tensor_map(args.q, grid.group, grid.pack_heads, grid.pack_tokens);
  else
    params.q = make_tensor_map(args.q, Config::kQueries / Config::kQueryParts);
  // Without keys no block of them is ever copied, but the kernel's parameters need some map.
  params.k = has_elements(args.k) ? make_tensor_map(args.k, Config::kKeys) : params.q;
  params.v = has_elements(args.v) ? make_tensor_map(args.v, Config::kKeys) : params.q;
  if constexpr (Config::kStagesOutput) params.out_boxes = make_tensor_map(args.out, kOutputRows);
  params.out = args.out.data;
  std::copy_n(args.out.stride, 3, params.out_stride);
  params.lse = args.lse, params.entropy = args.entropy, params.max_probability = args.max_probability;
  params.scale_log2 = static_cast<float>(scale_of(args) * 1.4426950408889634);
  // A scale of 0 becomes the least normal number: it makes all scores alike, and those of hidden keys stay -inf.
  if (!Config::kMasks) params.scale_log2 = std::max(params.scale_log2, FLT_MIN);
  params.dim_v = static_cast<int>(args.v.shape[3]);
  params.mask = view_of(args.mask, args.q.dtype);
  return params;
}

// What the workspace holds.
struct ForwardArrays {
  unsigned* next_item;
  RowResult* part_rows;
  float* part_out;
};

// Of threads: as many as fit on the device, or items if those are fewer.
template <typename Config>
int block_count(const TileGrid& grid, int multiprocessors) {
  return std::min(item_count(grid), multiprocessors * Config::kBlocks);
}

// Whether blocks take items as they get free, not in turn: items take different times, or memory bounds them, which
// serves some multiprocessors sooner than others. Of heads that are one tile each, those with different key lengths
// differ. Few items do not pay for the counter.
bool taken_when_free(const adaattn_forward_args& args, const TileGrid& grid, int blocks) {
  const int items = item_count(grid);
  if (items <= blocks) return false;
  if (args.key_lengths != nullptr || (tiles_differ(args) && grid.tiles_per_pack > 1)) return true;
  return args.k.shape[2] <= kShortKeys && items / 8 >= blocks;
}

template <typename Config>
ForwardArrays lay_out(const adaattn_forward_args& args, const TileGrid& grid, int blocks, Scratch& scratch) {
  ForwardArrays arrays{};
  if (taken_when_free(args, grid, blocks)) arrays.next_item = scratch.take<unsigned>(1);
  if (grid.parts > 1) {
    const auto rows = static_cast<std::size_t>(item_count(grid) - grid.whole_tiles) * Config::kQueries;
    arrays.part_rows = scratch.take<RowResult>(rows);
    arrays.part_out = scratch.take<float>(rows * static_cast<std::size_t>(args.v.shape[3]));
  }
  return arrays;
}

template <typename T, typename Config>
void launch(const Args& args) {
  const Device device = current_device();
  const TileGrid grid = make_grid<Config>(args, device.multiprocessors);
  ForwardParams params = make_params<Config>(args, grid);
  Scratch scratch(args.workspace);
  const int blocks = block_count<Config>(grid, device.multiprocessors);
  const ForwardArrays arrays = lay_out<Config>(args, grid, blocks, scratch);
  params.part_rows = arrays.part_rows, params.part_out = arrays.part_out, params.next_item = arrays.next_item;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  if (params.next_item != nullptr)
    ADAATTN_CUDA_CHECK(cudaMemsetAsync(params.next_item, 0, sizeof(*params.next_item), stream));
  launch_forward<T, Config>(params, {.device = device.index, .blocks = blocks, .stream = stream});
}

template <typename Use>
std::size_t workspace(const Args& args) {
  if (!has_elements(args.out)) return 0;
  Scratch scratch(nullptr);
  with_instance<Use>(args, [&]<typename T, typename Config>(T, Config) {
    const int multiprocessors = current_device().multiprocessors;
    const TileGrid grid = make_grid<Config>(args, multiprocessors);
    lay_out<Config>(args, grid, block_count<Config>(grid, multiprocessors), scratch);
  });
  return scratch.bytes();
}

template <typename Use>
void run(const Args& args) {
  if (!has_elements(args.out)) return;
  with_instance<Use>(args, [&]<typename T, typename Config>(T, Config) { launch<T, Config>(args); });
}

template <typename Use>
bool named(const Args& args) {
  return args.options.kernel != nullptr && std::strcmp(args.options.kernel, Use::kName) == 0;
}

Reasons declines_any(const Args& args) {
  constexpr std::int64_t kMostTokens = 1 << 30, kMostTiles = 1 << 30;
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1], nq = args.q.shape[2], nk = args.k.shape[2];
  const auto multiple_of_8_to_256 = [](std::int64_t dim) { return dim % 8 == 0 && dim <= 256; };
  return Reasons()
      .unless(args.q.dtype == ADAATTN_FLOAT16 || args.q.dtype == ADAATTN_BFLOAT16, "takes float16 and bfloat16 only")
      .unless(multiple_of_8_to_256(args.q.shape[3]) && multiple_of_8_to_256(args.v.shape[3]),
              "D and Dv must be multiples of 8, at most 256")
      .unless(
          tensor_map_fits(args.q) && tensor_map_fits(args.k) && tensor_map_fits(args.v) && tensor_map_fits(args.out),
          "q, k, v and out need a contiguous dim, positive strides that are multiples of 16 bytes, and data on 16 "
          "bytes")
      .unless(nq <= kMostTokens && nk <= kMostTokens && heads <= kMostTiles / (nq / 64 + 1),
              "too many tokens or heads");
}

bool has_extras(const Args& args) {
  return args.mask.data != nullptr || args.entropy != nullptr || args.max_probability != nullptr;
}

Reasons declines_plain(const Args& args) {
  return declines_any(args)
      .unless(args.mask.data == nullptr, "takes no mask tensor")
      .unless(args.entropy == nullptr && args.max_probability == nullptr,
              "computes neither entropy nor max_probability")
      .unless(scale_of(args) >= 0, "takes no negative scale");
}

// The copy engine's strides end at 2^40 bytes; the one from key head to key head of packed queries is group times a
// head's.
Reasons declines_packed(const Args& args, Reasons reasons) {
  const bool fits = args.q.shape[1] <= 1 || args.q.stride[1] < (std::int64_t{1} << 39) / args.q.shape[1];
  return reasons.unless(fits, "the heads of q lie too far apart");
}

// Reasons are listed on machines without such a device, too: then as of an H100.
std::int64_t multiprocessors() { return current_device_is(90) ? current_device().multiprocessors : 132; }

// Few rows: those of a group fit one tile, a head's do not fill half of one where heads can share it, or the usual
// tiles would leave half the multiprocessors idle.
bool has_few_rows(const Args& args) {
  if (!has_elements(args.out)) return false;
  const std::int64_t group = args.q.shape[1] / args.k.shape[1], nq = args.q.shape[2];
  if (nq * group <= 64 || (group > 1 && nq <= 32)) return true;
  std::int64_t tiles = 0;
  with_instance<Usual>(args, [&]<typename T, typename Config>(T, Config) {
    tiles = args.q.shape[0] * args.q.shape[1] * ((nq + Config::kQueries - 1) / Config::kQueries);
  });
  return 2 * tiles <= multiprocessors();
}

Reasons declines_few(const Args& args) {
  const Reasons reasons = declines_packed(args, declines_plain(args));
  if (!reasons.empty() || named<Few>(args)) return reasons;
  return Reasons(reasons).unless(has_few_rows(args), "leaves what fills the multiprocessors to sm90_forward");
}

Reasons declines_short(const Args& args) {
  Reasons reasons = declines_plain(args);
  reasons.unless(dim_of(args) <= 128, "D and Dv must be at most 128");
  if (!reasons.empty() || named<Short>(args)) return reasons;
  const std::int64_t nq = args.q.shape[2], nk = args.k.shape[2];
  const bool whole_step = nq > 64 && nk == 128 && !tiles_differ(args);
  return reasons
      .unless(dim_of(args) <= 64 && nq <= 128 && nk <= 128,
              "leaves more than 128 tokens, and D over 64, to sm90_forward")
      .unless(!whole_step, "leaves heads of one whole step of 128 keys to sm90_forward");
}

Reasons declines_masks(const Args& args) {
  const Reasons reasons = declines_packed(args, declines_any(args));
  if (!reasons.empty() || named<Any>(args)) return reasons;
  return Reasons(reasons).unless(has_extras(args) || scale_of(args) < 0,
                                 "leaves calls without a mask tensor and row statistics to sm90_forward");
}

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

template <typename Use>
constexpr ForwardKernel row(const char* summary, Reasons (*declines)(const Args&)) {
  return {.name = Use::kName,
          .summary = summary,
          .device = ADAATTN_CUDA,
          .unavailable = needs_sm90,
          .declines = declines,
          .workspace = workspace<Use>,
          .run = run<Use>};
}

constexpr std::array kRows = {
    row<Few>("exact, 16 bits on Hopper tensor cores; few query rows: heads of a group share tiles, keys are split",
             declines_few),
    row<Short>("exact, 16 bits on Hopper tensor cores; short sequences, D in steps of 8 to 128", declines_short),
    row<Usual>("exact, float16 and bfloat16 on Hopper tensor cores; D in steps of 8 to 256", declines_plain),
    row<Any>("exact, 16 bits on Hopper tensor cores; mask tensors, entropy and max_probability", declines_masks)};

// Tiles of listed blocks.
struct Listed {
  template <typename T, typename Visitor>
  static void with_config(const Args& args, const Visitor& visit) {
    const bool small = dim_of(args) <= 64;
    if constexpr (std::is_same_v<T, __half>)
      small ? visit(ListedHalf64{}) : visit(ListedHalf128{});
    else
      small ? visit(Listed64{}) : visit(Listed128{});
  }
};

}  // namespace

std::span<const ForwardKernel> forward_rows() { return kRows; }

int listed_tile_rows(const Args& args) {
  int rows = 0;
  with_instance<Listed>(args, [&]<typename T, typename Config>(T, Config) { rows = Config::kQueries; });
  return rows;
}

void attend_listed(const Args& args, const ForwardLists& lists, unsigned* next_item) {
  with_instance<Listed>(args, [&]<typename T, typename Config>(T, Config) {
    const Device device = current_device();
    TileGrid grid = make_grid<Config>(args, device.multiprocessors);
    grid.packs_at_once = packs_in_cache(args, grid.packs_per_key_head);
    ForwardParams params = make_params<Config>(args, grid);
    params.lists = lists;
    params.next_item = next_item;
    const int blocks = std::min(item_count(grid), device.multiprocessors);
    launch_forward<T, Config>(
        params, {.device = device.index, .blocks = blocks, .stream = static_cast<cudaStream_t>(args.stream)});
  });
}

}  // namespace adaattn::cuda::sm90
