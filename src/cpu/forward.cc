// Exact forward attention on the CPU, one source for every instruction set.
//
// Queries lie along the vector lanes: the scores of a tile are S^T = K Q^T with K read as it lies in memory, one
// broadcast key element at a time, so that neither K nor V is ever packed, the softmax needs no reduction across lanes,
// and out^T += V^T P^T reads V as it lies, too. Only the block's few query rows are transposed, once on their way in
// and once on their way out.
#include "cpu/forward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/forward_plan.h"
#include "cpu/mask_terms-inl.h"
#include "cpu/non_finite.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/threads.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

struct KeyTile {
  std::int64_t first;
  std::size_t keys;
  FloatRows k, v;
  bool v_checked, v_finite;  // whether v holds only finite values; asked once, when a panel has hidden keys
};

template <bool kMasked>
HWY_INLINE void attend_part(const ForwardPlan& plan, const ForwardScratch& scratch, const Visibility& visibility,
                            const Panel& panel, KeyTile& tile, const TileView& view, const float* terms) {
  const FloatTag d;
  const adaattn_forward_args& args = *plan.args;
  const auto dim = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  const auto offset = static_cast<std::size_t>(view.begin - tile.first);
  const auto keys = static_cast<std::size_t>(view.end - view.begin);

  Pair top = {hn::Set(d, kNegativeInfinity), hn::Set(d, kNegativeInfinity)};
  StoreScores store_scores{scratch.scores, &top};
  panel_gemm<ALayout::kRowMajor>(keys, tile.k.data + offset * tile.k.ld, tile.k.ld, panel.q, kPanelLanes, dim,
                                 store_scores);
  if constexpr (kMasked) {
    const LaneBounds<kPanelLanes> bounds(visibility, panel.rows, tile.first);
    top = mask_scores(scratch.scores, keys, static_cast<std::int32_t>(offset), bounds, terms);
  }

  const Pair old_reference = load_pair(panel.state.reference);
  bool moved = false;
  const FloatVector low = follow_reference(panel.state.reference, panel.state.top, top.low, moved);
  const FloatVector high =
      follow_reference(panel.state.reference + kVectorLanes, panel.state.top + kVectorLanes, top.high, moved);
  if (moved) rescale(panel, dv, old_reference, {low, high});
  if (args.entropy != nullptr)
    exponentiate<kMasked, true>(scratch.scores, keys, panel.state);
  else
    exponentiate<kMasked, false>(scratch.scores, keys, panel.state);

  const float* v = tile.v.data + offset * tile.v.ld;
  AddCompensated add{panel.out, panel.compensation};
  if constexpr (kMasked) {
    if (!tile.v_checked) tile.v_finite = all_finite(tile.v, tile.keys, dv);
    tile.v_checked = true;
    if (!tile.v_finite) {
      add_non_finite(v, tile.v.ld, keys, dv, kPanelLanes, {scratch.scores, 1, kPanelLanes},
                     {panel.out, 1, kPanelLanes});
      v = clean_copy(v, tile.v.ld, keys, dv, scratch.v_clean, dv);
      panel_gemm<ALayout::kTransposed>(dv, v, dv, scratch.scores, kPanelLanes, keys, add);
      return;
    }
  }
  panel_gemm<ALayout::kTransposed>(dv, v, tile.v.ld, scratch.scores, kPanelLanes, keys, add);
}

HWY_NOINLINE void attend_tile(const ForwardPlan& plan, const ForwardScratch& scratch, const Visibility& visibility,
                              const Panel& panel, KeyTile& tile, const TileView& view) {
  const adaattn_tensor& mask = plan.args->mask;
  const auto keys = static_cast<std::size_t>(view.end - view.begin);
  MaskEffect effect = MaskEffect::kNone;
  if (mask.data != nullptr)
    effect = fill_mask_terms(mask, panel.rows, view.begin, keys, scratch.row_terms, scratch.terms);
  if (effect == MaskEffect::kHidesAll) return;
  if (view.all_visible && effect == MaskEffect::kNone)
    attend_part<false>(plan, scratch, visibility, panel, tile, view, nullptr);
  else
    attend_part<true>(plan, scratch, visibility, panel, tile, view,
                      effect == MaskEffect::kSome ? scratch.terms : nullptr);
}

void forward_task(const ForwardPlan& plan, std::int64_t task, const ForwardScratch& scratch) {
  const adaattn_forward_args& args = *plan.args;
  const auto d = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  const std::int64_t head = task / plan.blocks, b = head / args.k.shape[1], key_head = head % args.k.shape[1];
  // The last blocks see the most keys under a causal mask: they go first, so that no long task is left for the end.
  const std::int64_t first = (plan.blocks - 1 - task % plan.blocks) * plan.block;
  const PanelRows block = {.b = b,
                           .first_head = key_head * plan.group,
                           .nq = args.q.shape[2],
                           .first = first,
                           .count = std::min(plan.block, plan.rows - first)};
  const Visibility visibility = visibility_of(plan, b);
  const std::size_t panels = (static_cast<std::size_t>(block.count) + kPanelLanes - 1) / kPanelLanes;
  for (std::size_t p = 0; p < panels; ++p) begin_panel(plan, scratch, panel_at(plan, scratch, block, p));

  const KeyRange range = visible_keys(visibility, block.first_query(), block.last_query());
  const KeyRange segments[] = {{.sink_end = 0, .begin = 0, .end = range.sink_end}, range};
  constexpr auto kTile = static_cast<std::int64_t>(kKeyTile);
  for (const KeyRange& segment : segments)
    for (std::int64_t begin = segment.begin; begin < segment.end; begin += kTile) {
      const std::int64_t end = std::min(begin + kTile, segment.end);
      const auto keys = static_cast<std::size_t>(end - begin);
      KeyTile tile = {.first = begin,
                      .keys = keys,
                      .k = float_rows(rows_of(args.k, b, key_head, begin), keys, d, scratch.k_tile),
                      .v = float_rows(rows_of(args.v, b, key_head, begin), keys, dv, scratch.v_tile),
                      .v_checked = false,
                      .v_finite = false};
      for (std::size_t p = 0; p < panels; ++p) {
        const Panel panel = panel_at(plan, scratch, block, p);
        const TileView view = view_tile(visibility, panel.rows, begin, end);
        if (view.begin < view.end) attend_tile(plan, scratch, visibility, panel, tile, view);
      }
    }
  for (std::size_t p = 0; p < panels; ++p) finish_panel(plan, scratch, panel_at(plan, scratch, block, p));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(forward_task);

namespace {

ForwardScratch lay_out_thread(const adaattn_forward_args& args, Scratch& scratch, int thread) {
  ForwardScratch result{};
  for (int t = 0; t <= thread; ++t) result = lay_out(args, scratch);
  return result;
}

}  // namespace

void run_forward_task(const ForwardPlan& plan, std::int64_t task, const ForwardScratch& scratch) {
  HWY_DYNAMIC_DISPATCH(forward_task)(plan, task, scratch);
}

std::size_t forward_workspace(const adaattn_forward_args& args) {
  Scratch scratch(nullptr);
  lay_out_thread(args, scratch, thread_count(args.options.num_threads) - 1);
  return scratch.bytes();
}

void forward(const adaattn_forward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const ForwardPlan plan = make_forward_plan(args, threads);
#pragma omp parallel num_threads(threads_for(args.q, args.k, args.v, threads))
  {
    Scratch scratch(args.workspace);
    const ForwardScratch mine = lay_out_thread(args, scratch, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < plan.tasks; ++task) run_forward_task(plan, task, mine);
  }
}

}  // namespace adaattn::cpu
#endif
