#include "cuda/sm90/adaptive/adaptive.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/error.h"
#include "common/scratch.h"
#include "cuda/common/call.h"
#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/adaptive/basis.h"
#include "cuda/sm90/adaptive/levels.h"
#include "cuda/sm90/adaptive/measure.h"
#include "cuda/sm90/adaptive/screen.h"
#include "cuda/sm90/adaptive/stages.h"
#include "cuda/sm90/forward/listed.h"
#include "plan/ladder.h"

namespace adaattn::cuda::sm90 {
namespace {

using Args = adaattn_forward_args;
constexpr char kName[] = "sm90_adaptive";

// For tighter budgets what is left out saves hardly more than the stages before take, and single rows that no probe
// finds weigh more (docs/budgets.md).
constexpr double kLeastError = 2.5e-2;
// Sequences of fewer tokens have little to leave out, and calls of fewer multiply-adds end before the stages have paid:
// looking at heads that then run densely takes about 60 us.
constexpr std::int64_t kLeastTokens = 8192;
constexpr double kLeastWork = 3e11;

Rows16 rows_of(const adaattn_tensor& t) {
  Rows16 rows{.data = static_cast<const std::uint16_t*>(t.data), .stride = {}};
  std::copy_n(t.stride, 3, rows.stride);
  return rows;
}

// On the current device.
AdaptiveShape shape_of(const Args& args) {
  const adaattn_options& o = args.options;
  AdaptiveShape shape{
      .batch = static_cast<int>(args.q.shape[0]),
      .heads = static_cast<int>(args.q.shape[1]),
      .group = static_cast<int>(args.q.shape[1] / args.k.shape[1]),
      .queries = static_cast<int>(args.q.shape[2]),
      .keys = static_cast<int>(args.k.shape[2]),
      .dim_qk = static_cast<int>(args.q.shape[3]),
      .dim_v = static_cast<int>(args.v.shape[3]),
      .dim = dim_of(args) <= 64 ? 64 : 128,
      .causal = o.causal != 0,
      .diagonal = o.alignment == ADAATTN_BOTTOM_RIGHT ? static_cast<int>(args.k.shape[2] - args.q.shape[2]) : 0,
      .bfloat16 = args.q.dtype == ADAATTN_BFLOAT16,
      .scale_log2 = static_cast<float>(scale_of(args) * 1.4426950408889634),
      .error = static_cast<float>(o.error),
      .tile_rows = listed_tile_rows(args),
      .workers = 0};
  shape.workers = static_cast<int>(
      std::min<std::int64_t>(current_device().multiprocessors, std::int64_t{shape.query_heads()} * shape.blocks()));
  return shape;
}

static_assert(kListedKeys == kBlockKeys, "lists are of the screen's blocks");

std::size_t counter_count(const AdaptiveShape& shape) { return static_cast<std::size_t>(shape.query_heads()) + 3; }

AdaptiveArrays lay_out(const Args& args, const AdaptiveShape& s, Scratch& scratch) {
  const auto kh = static_cast<std::size_t>(s.key_heads()), qh = static_cast<std::size_t>(s.query_heads());
  const auto dim = static_cast<std::size_t>(s.dim), blocks = static_cast<std::size_t>(s.blocks());
  const auto tiles = static_cast<std::size_t>(s.tiles()), chunks = static_cast<std::size_t>(s.chunks());
  AdaptiveArrays a{};
  a.y = scratch.take<std::uint16_t>(kh * kScreenRank * dim);
  a.z = scratch.take<std::uint16_t>(kh * kScreenRank * dim);
  a.y_means = scratch.take<float>(kh * kScreenRank);
  a.energy = scratch.take<float>(kh);
  a.k8 = scratch.take<std::uint8_t>(kh * blocks * kBlockKeys * kScreenRank);
  a.value_means = scratch.take<float>(kh * blocks * dim);
  a.block_masses = scratch.take<Mass>(qh * kProbeRows * blocks);
  a.chunk_masses = scratch.take<Mass>(chunks * kProbeRows);
  a.chunk_out = scratch.take<float>(chunks * kProbeRows * dim);
  a.not_finite = scratch.take<unsigned>(kh);
  a.distances = scratch.take<float>(qh * static_cast<std::size_t>(s.screen_strips()) * blocks);
  a.order = scratch.take<std::uint16_t>(qh * tiles * blocks);
  a.up_to_level = scratch.take<std::uint16_t>(qh * tiles * kLevels);
  a.kept = scratch.take<std::uint16_t>(qh * tiles);
  a.exact_out = scratch.take<float>(qh * kProbeRows * dim);
  a.level_sums = scratch.take<LevelSums>(qh * kDecideParts * kLevels);
  a.counters = scratch.take<unsigned>(counter_count(s));
  a.states = scratch.take<HeadState>(qh);
  a.missed = scratch.take<int>(qh);
  a.missed_count = scratch.take<int>(1);
  if (args.plans != nullptr) a.given = scratch.take<int>(qh);
  return a;
}

constexpr double kPowerOfLevel = 0.6931471805599453 / static_cast<double>(kLevelsPerPower);

// What a plan asks for; negative: to choose.
int level_of(const adaattn_head_plan& plan) {
  if (plan.form == ADAATTN_AUTOMATIC) return -1;
  if (plan.form == ADAATTN_DENSE || !(plan.screen > kNever)) return kLevels - 1;
  return std::clamp(static_cast<int>(std::lround(-static_cast<double>(plan.screen) / kPowerOfLevel)), 0, kLevels - 2);
}

adaattn_head_report report_of(const HeadState& state, const Args& args) {
  const std::int32_t precision =
      args.q.dtype == ADAATTN_BFLOAT16 ? ADAATTN_PRECISION_BFLOAT16 : ADAATTN_PRECISION_FLOAT16;
  adaattn_head_report report{};
  report.plan = dense_plan(precision);
  report.escalations = state.escalations;
  report.estimated_error = static_cast<double>(state.value);
  report.estimated_limit = static_cast<double>(state.limit);
  report.error_bound = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  report.summarised_mass = report.omitted_mass = report.accounted_error = nan;
  const double kept = state.visible > 0 ? static_cast<double>(state.kept) / state.visible : 1;
  const bool screened = state.energy >= kLeastScreenEnergy;
  // 8-bit scores of rank kScreenRank, and the probe rows.
  const double looks = screened ? 0.25 * kScreenRank / static_cast<double>(args.q.shape[3]) +
                                      static_cast<double>(kProbeRows) / static_cast<double>(args.q.shape[2])
                                : 0;
  report.work = kept + looks + (state.escalations > 0 ? 1 : 0);
  if (state.level == kLevels - 1) return report;
  report.plan.form = ADAATTN_TILED;
  report.plan.screen = static_cast<float>(-state.level * kPowerOfLevel);
  report.tiles = state.visible, report.high_tiles = state.kept, report.dropped_tiles = state.visible - state.kept;
  return report;
}

// Waits for the stream.
void read_reports(const Args& args, const HeadState* states) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  std::vector<HeadState> found(static_cast<std::size_t>(args.q.shape[0] * args.q.shape[1]));
  ADAATTN_CUDA_CHECK(
      cudaMemcpyAsync(found.data(), states, found.size() * sizeof(HeadState), cudaMemcpyDeviceToHost, stream));
  ADAATTN_CUDA_CHECK(cudaStreamSynchronize(stream));
  std::transform(found.begin(), found.end(), args.heads,
                 [&](const HeadState& state) { return report_of(state, args); });
}

void refuse_while_captured(const Args& args) {
  cudaStreamCaptureStatus status{};
  ADAATTN_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(args.stream), &status));
  if (status != cudaStreamCaptureStatusNone)
    throw StatusError(ADAATTN_UNSUPPORTED,
                      "heads is not NULL while the stream is captured: reports wait for the stream; must be NULL");
}

std::size_t workspace(const Args& args) {
  if (!has_elements(args.out)) return 0;
  Scratch scratch(nullptr);
  lay_out(args, shape_of(args), scratch);
  return scratch.bytes();
}

void run(const Args& args) {
  if (!has_elements(args.out)) return;
  if (args.heads != nullptr) refuse_while_captured(args);
  const AdaptiveShape shape = shape_of(args);
  Scratch scratch(args.workspace);
  const AdaptiveArrays arrays = lay_out(args, shape, scratch);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  ADAATTN_CUDA_CHECK(cudaMemsetAsync(arrays.counters, 0, counter_count(shape) * sizeof(unsigned), stream));
  if (args.plans != nullptr) {
    std::vector<int> levels(static_cast<std::size_t>(shape.query_heads()));
    std::transform(args.plans, args.plans + shape.query_heads(), levels.begin(), level_of);
    set_levels(levels, arrays.given, stream);
  }
  const Rows16 q = rows_of(args.q), k = rows_of(args.k), v = rows_of(args.v);
  launch_basis(shape, q, k, arrays, stream);
  launch_measure(shape, q, k, v, arrays, stream);
  launch_screen(shape, q, arrays, stream);
  launch_order(shape, arrays, stream);
  launch_decide(shape, arrays, stream);
  unsigned* const next_item = arrays.counters + shape.query_heads() + 1;
  ForwardLists lists{
      .order = arrays.order, .count = arrays.kept, .heads = nullptr, .head_count = nullptr, .blocks = shape.blocks()};
  attend_listed(args, lists, next_item);
  launch_verify(shape, rows_of(args.out), arrays, stream);
  lists.heads = arrays.missed, lists.head_count = arrays.missed_count;
  attend_listed(args, lists, next_item + 1);
  if (args.heads != nullptr) read_reports(args, arrays.states);
}

double work_of(const Args& args) {
  const auto size = [](std::int64_t n) { return static_cast<double>(n); };
  const double all = size(args.q.shape[0] * args.q.shape[1]) * size(args.q.shape[2]) * size(args.k.shape[2]) *
                     size(args.q.shape[3] + args.v.shape[3]);
  return args.options.causal != 0 ? all / 2 : all;
}

bool has_low_rank(const Args& args) {
  return args.plans != nullptr &&
         std::any_of(args.plans, args.plans + args.q.shape[0] * args.q.shape[1],
                     [](const adaattn_head_plan& plan) { return plan.form == ADAATTN_LOW_RANK; });
}

bool all_dense(const Args& args) {
  return args.plans != nullptr &&
         std::all_of(args.plans, args.plans + args.q.shape[0] * args.q.shape[1],
                     [](const adaattn_head_plan& plan) { return level_of(plan) == kLevels - 1; });
}

Reasons declines(const Args& args) {
  const adaattn_options& o = args.options;
  const bool named = o.kernel != nullptr && std::strcmp(o.kernel, kName) == 0;
  const auto fits = [](const adaattn_tensor& t) { return t.shape[3] % 8 == 0 && t.shape[3] <= 128; };
  Reasons reasons;
  reasons.unless(o.error >= kLeastError && o.guarantee == ADAATTN_MEASURED,
                 "takes measured budgets of 2.5e-2 and more only");
  if (o.error == 0) return reasons;  // exact calls are told soon
  reasons
      .unless((args.q.dtype == ADAATTN_FLOAT16 || args.q.dtype == ADAATTN_BFLOAT16) && fits(args.q) && fits(args.v),
              "takes float16 and bfloat16 with D and Dv in steps of 8 to 128 only")
      .unless(args.mask.data == nullptr && args.key_lengths == nullptr && o.window_left < 0 && o.window_right < 0,
              "takes neither masks nor windows nor key lengths")
      .unless(args.entropy == nullptr && args.max_probability == nullptr && args.tile_classes == nullptr,
              "computes no entropy and max_probability, and keeps no classes of tiles")
      .unless(
          tensor_map_fits(args.q) && tensor_map_fits(args.k) && tensor_map_fits(args.v) && tensor_map_fits(args.out),
          "q, k, v and out need a contiguous dim, positive strides that are multiples of 16 bytes, and data on 16 "
          "bytes")
      .unless(scale_of(args) > 0 &&
                  (o.causal == 0 || o.alignment == ADAATTN_TOP_LEFT || args.k.shape[2] >= args.q.shape[2]),
              "takes positive scales only, and no causal mask that hides every key from some queries")
      .unless(args.k.shape[2] <= std::int64_t{kMostBlocks} * kBlockKeys && args.q.shape[2] <= (1 << 20) &&
                  args.q.shape[0] * args.q.shape[1] <= 65535,
              "takes up to 65,536 keys and 65,535 heads");
  if (!reasons.empty()) return reasons;
  return Reasons(reasons)
      .unless(!has_low_rank(args), "runs no low-rank heads")
      .unless(!all_dense(args), "leaves plans that are all dense to the exact kernels")
      .unless(std::min(args.q.shape[2], args.k.shape[2]) >= (named ? kProbeRows : kLeastTokens) &&
                  (named || work_of(args) >= kLeastWork),
              "leaves fewer than 8,192 tokens, and little work, to the exact kernels");
}

Reasons needs_sm90() {
  return Reasons().unless(current_device_is(90), "needs a current device of compute capability 9.0 (H100, H200)");
}

constexpr std::array kRows = {ForwardKernel{
    .name = kName,
    .summary = "within a budget, on Hopper tensor cores: leaves out the blocks of keys that a screen finds far below",
    .device = ADAATTN_CUDA,
    .unavailable = needs_sm90,
    .declines = declines,
    .workspace = workspace,
    .run = run}};

}  // namespace

std::span<const ForwardKernel> adaptive_rows() { return kRows; }

}  // namespace adaattn::cuda::sm90
