#include "cpu/tiled.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/tiled.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/online_softmax-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

// Epilogue of screened scores: only the largest of each lane is kept.
struct KeepTop {
  Pair* top;
  HWY_INLINE KeepTop at(std::size_t) const { return *this; }
  HWY_INLINE void operator()(std::size_t, FloatVector low, FloatVector high) const {
    top->low = hn::Max(top->low, low);
    top->high = hn::Max(top->high, high);
  }
};

// What a block's panels know of the tiles.
struct BlockTiles {
  std::size_t tiles;  // up to the last that the block sees
  std::size_t panels;
  std::int64_t key_end;  // past the last key that the block sees
  const TiledScratch* scratch;
  std::size_t summarised[kMaxBlock / kPanelLanes];

  float* masses(std::size_t panel) const { return scratch->masses + panel * tiles * kPanelLanes; }
  std::int32_t* list(std::size_t panel) const { return scratch->lists + panel * tiles; }
  std::uint8_t* kept(std::size_t panel) const { return scratch->kept + panel * tiles; }
};

HWY_INLINE TileView view_screen_tile(const Visibility& visibility, const Panel& panel, std::size_t tile,
                                     std::int64_t keys) {
  const std::int64_t begin = static_cast<std::int64_t>(tile) * kScreenTile;
  return view_tile(visibility, panel.rows, begin, std::min(begin + kScreenTile, keys));
}

// Marks the tiles whose best screened score comes near enough to the row's best for some row; the first tile, the
// last that is seen and those that only part of the rows see stay in any case.
HWY_NOINLINE void screen_panel(const ForwardPlan& plan, const Visibility& visibility, const Panel& panel,
                               const Screen& screen, float threshold, const BlockTiles& block, std::size_t index,
                               TileCounts& counts) {
  const FloatTag d;
  const auto dim = static_cast<std::size_t>(plan.args->q.shape[3]);
  const TiledScratch& scratch = *block.scratch;
  StoreRows<false> store{scratch.screened_q, kPanelLanes};
  panel_gemm<ALayout::kTransposed>(kScreenRank, screen.z, kScreenRank, panel.q, kPanelLanes, dim, store);
  const FloatVector lowest = hn::Set(d, kNegativeInfinity);
  Pair best = {lowest, lowest};
  std::uint8_t* kept = block.kept(index);
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    const TileView view = view_screen_tile(visibility, panel, tile, plan.args->k.shape[2]);
    kept[tile] = static_cast<std::uint8_t>(view.begin < view.end);
    if (view.begin >= view.end) continue;
    ++counts.visible;
    Pair top = {lowest, lowest};
    KeepTop keep{&top};
    panel_gemm<ALayout::kRowMajor>(static_cast<std::size_t>(view.end - view.begin),
                                   screen.k + static_cast<std::size_t>(view.begin) * kScreenRank, kScreenRank,
                                   scratch.screened_q, kPanelLanes, kScreenRank, keep);
    store_pair(top, scratch.tops + tile * kPanelLanes);
    if (!view.all_visible) continue;  // its best score may belong to a key that a row does not see
    best = {hn::Max(best.low, top.low), hn::Max(best.high, top.high)};
  }
  const FloatVector margin = hn::Set(d, threshold);
  const Pair limit = {hn::Add(best.low, margin), hn::Add(best.high, margin)};
  for (std::size_t tile = 1; tile + 1 < block.tiles; ++tile) {
    if (kept[tile] == 0 || !view_screen_tile(visibility, panel, tile, plan.args->k.shape[2]).all_visible) continue;
    const Pair top = load_pair(scratch.tops + tile * kPanelLanes);
    // "not below" keeps tiles with NaN
    const bool below = hn::AllTrue(d, hn::Lt(top.low, limit.low)) && hn::AllTrue(d, hn::Lt(top.high, limit.high));
    kept[tile] = static_cast<std::uint8_t>(!below);
    counts.left_out += static_cast<std::int64_t>(below);
  }
}

// Scores to probabilities, in place; returns their sums. Where moment is not null it receives the sums of p * log2(p).
template <bool kMasked>
HWY_INLINE Pair tile_mass(float* scores, std::size_t keys, const RowState& state, Pair* moment) {
  const FloatTag d;
  const FloatVector log2e = hn::Set(d, kLog2E), hidden = hn::Set(d, kNegativeInfinity);
  const Pair reference = load_pair(state.reference);
  Pair sums[2] = {{hn::Zero(d), hn::Zero(d)}, {hn::Zero(d), hn::Zero(d)}};
  if (moment != nullptr) *moment = sums[0];
  for (std::size_t key = 0; key < keys; ++key) {
    const Pair score = load_pair(scores + key * kPanelLanes);
    Pair p = {exp2_near_zero(hn::MulSub(score.low, log2e, reference.low)),
              exp2_near_zero(hn::MulSub(score.high, log2e, reference.high))};
    if constexpr (kMasked)
      p = {hn::IfThenZeroElse(hn::Eq(score.low, hidden), p.low),
           hn::IfThenZeroElse(hn::Eq(score.high, hidden), p.high)};
    store_pair(p, scores + key * kPanelLanes);
    if (moment != nullptr) {
      const Pair x = {hn::MulSub(score.low, log2e, reference.low), hn::MulSub(score.high, log2e, reference.high)};
      const auto none = hn::Zero(d);  // a hidden score is -inf, and 0 * -inf is not 0
      moment->low = hn::Add(moment->low, hn::IfThenZeroElse(hn::Eq(p.low, none), hn::Mul(p.low, x.low)));
      moment->high = hn::Add(moment->high, hn::IfThenZeroElse(hn::Eq(p.high, none), hn::Mul(p.high, x.high)));
    }
    Pair& sum = sums[key % 2];
    sum = {hn::Add(sum.low, p.low), hn::Add(sum.high, p.high)};
  }
  return {hn::Add(sums[0].low, sums[1].low), hn::Add(sums[0].high, sums[1].high)};
}

HWY_NOINLINE void attend_kept_tile(const ForwardPlan& plan, const ForwardScratch& scratch, const Visibility& visibility,
                                   const Panel& panel, std::size_t tile, const FloatRows& k, const FloatRows& v,
                                   float drop, BlockTiles& block, std::size_t index, TileCounts& counts) {
  const FloatTag d;
  const auto dim = static_cast<std::size_t>(plan.args->q.shape[3]),
             dv = static_cast<std::size_t>(plan.args->v.shape[3]);
  const std::int64_t first = static_cast<std::int64_t>(tile) * kScreenTile;
  const TileView view = view_screen_tile(visibility, panel, tile, plan.args->k.shape[2]);
  const auto keys = static_cast<std::size_t>(view.end - view.begin),
             offset = static_cast<std::size_t>(view.begin - first);
  Pair top = {hn::Set(d, kNegativeInfinity), hn::Set(d, kNegativeInfinity)};
  StoreScores store_scores{scratch.scores, &top};
  panel_gemm<ALayout::kRowMajor>(keys, k.data + offset * k.ld, k.ld, panel.q, kPanelLanes, dim, store_scores);
  if (!view.all_visible) {
    const LaneBounds<kPanelLanes> bounds(visibility, panel.rows, first);
    top = mask_scores(scratch.scores, keys, static_cast<std::int32_t>(offset), bounds, nullptr);
  }
  const RowState& state = panel.state;
  const Pair old_reference = load_pair(state.reference);
  bool moved = false;
  const FloatVector low = follow_reference(state.reference, state.top, top.low, moved);
  const FloatVector high = follow_reference(state.reference + kVectorLanes, state.top + kVectorLanes, top.high, moved);
  std::size_t& summarised = block.summarised[index];
  if (moved) {
    rescale(panel, dv, old_reference, {low, high});
    scale_rows(block.masses(index), summarised, {low, high});
  }
  Pair moment;
  Pair* wanted = plan.args->entropy != nullptr ? &moment : nullptr;
  const Pair mass = view.all_visible ? tile_mass<false>(scratch.scores, keys, state, wanted)
                                     : tile_mass<true>(scratch.scores, keys, state, wanted);
  const Pair sum = load_pair(state.sum);
  const FloatVector share = hn::Set(d, drop);
  const bool small = hn::AllTrue(d, hn::Le(mass.low, hn::Mul(share, sum.low))) &&
                     hn::AllTrue(d, hn::Le(mass.high, hn::Mul(share, sum.high)));
  if (small && view.all_visible) {  // what a row with hidden keys does not see must not reach it through the mean
    store_pair(mass, block.masses(index) + summarised * kPanelLanes);
    block.list(index)[summarised++] = static_cast<std::int32_t>(tile);
    ++counts.summarised;
    return;
  }
  ++counts.high;
  const AddCompensated add_sum{state.sum, state.compensation};
  add_sum.add(0, mass.low);
  add_sum.add(kVectorLanes, mass.high);
  if (wanted != nullptr) {
    const Pair old = load_pair(state.moment);
    store_pair({hn::Add(old.low, moment.low), hn::Add(old.high, moment.high)}, state.moment);
  }
  AddCompensated add{panel.out, panel.compensation};
  panel_gemm<ALayout::kTransposed>(dv, v.data + offset * v.ld, v.ld, scratch.scores, kPanelLanes, keys, add);
}

// A summarised tile's part of the entropy, as if its mass lay evenly on its keys.
void add_uniform_moments(const float* mass, float* moment) {
  for (std::size_t lane = 0; lane < kPanelLanes; ++lane)
    if (mass[lane] > 0) moment[lane] += mass[lane] * std::log2(mass[lane] / static_cast<float>(kScreenTile));
}

// out += sum over summarised tiles of mass * mean(v); their masses join the sum.
HWY_NOINLINE void add_summaries(const ForwardPlan& plan, const Panel& panel, const Screen& screen,
                                const BlockTiles& block, std::size_t index) {
  const auto dv = static_cast<std::size_t>(plan.args->v.shape[3]), width = padded_width(plan.args->v.shape[3]);
  const float* masses = block.masses(index);
  const AddCompensated add_sum{panel.state.sum, panel.state.compensation};
  for (std::size_t first = 0; first < block.summarised[index]; first += kKeyTile) {
    const std::size_t count = std::min(kKeyTile, block.summarised[index] - first);
    for (std::size_t i = 0; i < count; ++i) {
      const auto tile = static_cast<std::size_t>(block.list(index)[first + i]);
      std::copy_n(screen.value_means + tile * width, width, block.scratch->values + i * width);
      const Pair mass = load_pair(masses + (first + i) * kPanelLanes);
      add_sum.add(0, mass.low);
      add_sum.add(kVectorLanes, mass.high);
      if (plan.args->entropy != nullptr) add_uniform_moments(masses + (first + i) * kPanelLanes, panel.state.moment);
    }
    AddCompensated add{panel.out, panel.compensation};
    panel_gemm<ALayout::kTransposed>(dv, block.scratch->values, width, masses + first * kPanelLanes, kPanelLanes, count,
                                     add);
  }
}

PanelRows block_rows(const ForwardPlan& plan, std::int64_t task) {
  const std::int64_t first = (plan.blocks - 1 - task) * plan.block;
  return {.b = 0,
          .first_head = 0,
          .nq = plan.args->q.shape[2],
          .first = first,
          .count = std::min(plan.block, plan.rows - first)};
}

// Prepares the panels of a block and screens their tiles.
BlockTiles screen_block(const ForwardPlan& plan, const Visibility& visibility, const PanelRows& rows,
                        const Screen& screen, const TileRule& rule, const ForwardScratch& scratch,
                        const TiledScratch& tiled, TileCounts& counts) {
  const KeyRange range = visible_keys(visibility, rows.first_query(), rows.last_query());
  BlockTiles block = {.tiles = static_cast<std::size_t>((range.end + kScreenTile - 1) / kScreenTile),
                      .panels = (static_cast<std::size_t>(rows.count) + kPanelLanes - 1) / kPanelLanes,
                      .key_end = range.end,
                      .scratch = &tiled,
                      .summarised = {}};
  for (std::size_t p = 0; p < block.panels; ++p) {
    const Panel panel = panel_at(plan, scratch, rows, p);
    begin_panel(plan, scratch, panel);
    screen_panel(plan, visibility, panel, screen, rule.screen, block, p, counts);
  }
  return block;
}

}  // namespace

void screen_task(const ForwardPlan& plan, std::int64_t task, const Screen& screen, const TileRule& rule,
                 const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts) {
  screen_block(plan, visibility_of(plan, 0), block_rows(plan, task), screen, rule, scratch, tiled, counts);
}

void tiled_task(const ForwardPlan& plan, std::int64_t task, const Screen& screen, const TileRule& rule,
                const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts) {
  const adaattn_forward_args& args = *plan.args;
  const auto d = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  const PanelRows rows = block_rows(plan, task);
  const Visibility visibility = visibility_of(plan, 0);
  BlockTiles block = screen_block(plan, visibility, rows, screen, rule, scratch, tiled, counts);
  const std::size_t panels = block.panels;
  // Sinks first, then from the diagonal backwards: what comes late is then compared with nearly the whole sum.
  for (std::size_t step = 0; step < block.tiles; ++step) {
    const std::size_t tile = step == 0 ? 0 : block.tiles - step;
    bool wanted = false;
    for (std::size_t p = 0; p < panels; ++p) wanted = wanted || block.kept(p)[tile] != 0;
    if (!wanted) continue;
    const std::int64_t begin = static_cast<std::int64_t>(tile) * kScreenTile,
                       end = std::min(begin + kScreenTile, block.key_end);
    const auto keys = static_cast<std::size_t>(end - begin);
    const FloatRows k = float_rows(rows_of(args.k, 0, 0, begin), keys, d, scratch.k_tile);
    const FloatRows v = float_rows(rows_of(args.v, 0, 0, begin), keys, dv, scratch.v_tile);
    for (std::size_t p = 0; p < panels; ++p)
      if (block.kept(p)[tile] != 0)
        attend_kept_tile(plan, scratch, visibility, panel_at(plan, scratch, rows, p), tile, k, v, rule.drop, block, p,
                         counts);
  }
  for (std::size_t p = 0; p < panels; ++p) {
    const Panel panel = panel_at(plan, scratch, rows, p);
    add_summaries(plan, panel, screen, block, p);
    finish_panel(plan, scratch, panel);
  }
}

std::size_t lanes_of_panel() { return kPanelLanes; }

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(tiled_task);
HWY_EXPORT(screen_task);
HWY_EXPORT(lanes_of_panel);

std::size_t panel_rows() { return HWY_DYNAMIC_DISPATCH(lanes_of_panel)(); }

void run_tiled_task(const ForwardPlan& plan, std::int64_t task, const Screen& screen, const TileRule& rule,
                    const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts) {
  HWY_DYNAMIC_DISPATCH(tiled_task)(plan, task, screen, rule, scratch, tiled, counts);
}

void run_screen_task(const ForwardPlan& plan, std::int64_t task, const Screen& screen, const TileRule& rule,
                     const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts) {
  HWY_DYNAMIC_DISPATCH(screen_task)(plan, task, screen, rule, scratch, tiled, counts);
}

}  // namespace adaattn::cpu
#endif
