#include "cpu/tiled.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/tiled.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/emulated.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/screen_panel-inl.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/tile_account-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/tile_scores-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

PanelQueries queries_of(const TiledScratch& scratch, std::size_t panel, std::size_t dim) {
  float* rows = scratch.rows + panel * kQueryValues * kPanelLanes;
  return {.q8 = scratch.q8 + panel * fours(dim) * kPanelLanes,
          .q16 = scratch.q16 + panel * twos(dim) * kPanelLanes,
          .bias = reinterpret_cast<std::int32_t*>(rows),
          .q8_scale = rows + kPanelLanes,
          .offset = rows + 2 * kPanelLanes};
}

// One tile of keys, for all panels of a block.
struct KeyTile {
  std::size_t index;
  std::int64_t first;
  FloatRows k, v;  // where a panel computes in float32
};

template <class Keep>
HWY_INLINE Pair masses(bool masked, const float* scores, std::size_t keys, Pair reference, const Keep& keep,
                       Pair* moment) {
  return masked ? tile_mass<true>(scores, keys, reference, keep, moment)
                : tile_mass<false>(scores, keys, reference, keep, moment);
}

// out += rounded p times rounded v, in float8 of what v differs from its mean by. p [count][kPanelLanes] in the
// scores' place, float8 relative to the tile's largest.
HWY_NOINLINE void add_emulated_values(std::int32_t precision, const ForwardPlan& plan, const ForwardScratch& scratch,
                                      const TiledScratch& tiled, const KeyHead& keys, const Panel& panel,
                                      const KeyTile& tile, std::size_t count, Pair p_scale) {
  const auto dv = static_cast<std::size_t>(plan.args->v.shape[3]), width = padded_width(plan.args->v.shape[3]);
  const bool is_float8 = is_8_bit(precision);
  float factor[kPanelLanes];
  store_pair(p_scale, factor);
  for (std::size_t i = 0; i < count * kPanelLanes; ++i)
    scratch.scores[i] =
        is_float8 ? round_to_float8(scratch.scores[i]) * factor[i % kPanelLanes] : round_to_float16(scratch.scores[i]);
  for (std::size_t c = 0; c < dv; ++c) {
    const float mean = is_float8 ? keys.value_means[tile.index * width + c] : 0;
    for (std::size_t key = 0; key < count; ++key)
      tiled.emulated_v[key * dv + c] = tile.v.data[key * tile.v.ld + c] - mean;
    round_values(precision, tiled.emulated_v + c, count, dv);
  }
  AddCompensated add{panel.out, panel.compensation};
  panel_gemm<ALayout::kTransposed>(dv, tiled.emulated_v, dv, scratch.scores, kPanelLanes, count, add);
}

HWY_INLINE void add_values(std::int32_t precision, const ForwardPlan& plan, const ForwardScratch& scratch,
                           const TiledScratch& tiled, const KeyHead& keys, const Panel& panel, const KeyTile& tile,
                           std::size_t count, Pair p_scale) {
  const auto dv = static_cast<std::size_t>(plan.args->v.shape[3]), first = static_cast<std::size_t>(tile.first);
  if (is_emulated(precision)) {
    add_emulated_values(precision, plan, scratch, tiled, keys, panel, tile, count, p_scale);
  } else if (precision == ADAATTN_PRECISION_INT8) {
    if (native_dots().int8)
      add_int8_values<true>(keys.copy, first, count, dv, tiled.probabilities, p_scale, panel.out);
    else
      add_int8_values<false>(keys.copy, first, count, dv, tiled.probabilities, p_scale, panel.out);
  } else if (precision == ADAATTN_PRECISION_BFLOAT16) {
    if (native_dots().bfloat16)
      add_bfloat16_values<true>(keys.copy, first, count, dv, tiled.probabilities, panel.out);
    else
      add_bfloat16_values<false>(keys.copy, first, count, dv, tiled.probabilities, panel.out);
  } else {
    AddCompensated add{panel.out, panel.compensation};
    panel_gemm<ALayout::kTransposed>(dv, tile.v.data, tile.v.ld, scratch.scores, kPanelLanes, count, add);
  }
}

// A tile's probabilities in 8 bits are relative to its own largest, 255 or 448; these are the references for that, and
// the factors back to the running ones.
struct ByteScale {
  Pair reference, factor, shift;  // shift: log2 of factor, before it is held above 2^-126
};
HWY_INLINE ByteScale byte_scale(std::int32_t precision, Pair top, Pair reference) {
  const FloatTag d;
  const FloatVector lowest = hn::Set(d, std::numeric_limits<float>::lowest() / 4), log2e = hn::Set(d, kLog2E),
                    range = hn::Set(d, precision == ADAATTN_PRECISION_INT8 ? 7.99435344F : 8.80735492F);  // log2
  const auto own = [&](FloatVector t) HWY_ATTR { return hn::Sub(hn::Max(hn::Mul(t, log2e), lowest), range); };
  const Pair at = {own(top.low), own(top.high)};
  const Pair shift = {hn::Sub(at.low, reference.low), hn::Sub(at.high, reference.high)};
  return {at, {exp2_near_zero(shift.low), exp2_near_zero(shift.high)}, shift};
}

// p and moments relative to the running reference from those relative to the tile's.
HWY_INLINE void to_running(const ByteScale& scale, Pair& mass, Pair* moment) {
  if (moment != nullptr)
    *moment = {hn::Mul(scale.factor.low, hn::MulAdd(scale.shift.low, mass.low, moment->low)),
               hn::Mul(scale.factor.high, hn::MulAdd(scale.shift.high, mass.high, moment->high))};
  mass = {hn::Mul(mass.low, scale.factor.low), hn::Mul(mass.high, scale.factor.high)};
}

HWY_NOINLINE void attend_kept_tile(const ForwardPlan& plan, const ForwardScratch& scratch, const Visibility& visibility,
                                   const Panel& panel, const KeyHead& keys, const adaattn_head_plan& rule,
                                   const KeyTile& tile, BlockTiles& block, std::size_t index, TileCounts& counts) {
  const FloatTag d;
  const auto dim = static_cast<std::size_t>(plan.args->q.shape[3]),
             dv = static_cast<std::size_t>(plan.args->v.shape[3]);
  const TiledScratch& tiled = *block.scratch;
  const TileView view = view_class_tile(visibility, panel, tile.index, plan.args->k.shape[2]);
  const auto count = static_cast<std::size_t>(view.end - tile.first);
  std::uint8_t& tile_class = block.classes(index)[tile.index];
  const bool is_low = tile_class == ADAATTN_TILE_LOW;
  const std::int32_t precision = is_low ? rule.low_precision : rule.precision;
  const ScoredKeys scored = {.count = count,
                             .dim = dim,
                             .rows = tile.k,
                             .mean = keys.mean,
                             .copy = keys.copy,
                             .first = static_cast<std::size_t>(tile.first)};
  Pair top = tile_scores(precision, scored, panel.q, queries_of(tiled, index, dim),
                         {tiled.emulated_k, tiled.emulated_q}, scratch.scores);
  if (!view.all_visible) {
    const LaneBounds<kPanelLanes> bounds(visibility, panel.rows, tile.first);
    top = mask_scores(scratch.scores, count, 0, bounds, nullptr);
  }
  const RowState& state = panel.state;
  const Pair old_reference = load_pair(state.reference);
  bool moved = false;
  const FloatVector low = follow_reference(state.reference, state.top, top.low, moved);
  const FloatVector high = follow_reference(state.reference + kVectorLanes, state.top + kVectorLanes, top.high, moved);
  std::size_t& listed = block.listed[index];
  const bool accounted = asks_for_masses(*plan.args);
  if (moved) {
    rescale(panel, dv, old_reference, {low, high});
    scale_rows(block.masses(index), listed, {low, high});
    if (accounted) rescale_account(account_of(tiled, index, dv), dv, {low, high});
  }
  Pair moment;
  Pair* wanted = plan.args->entropy != nullptr ? &moment : nullptr;
  const Pair reference = load_pair(state.reference);
  ByteScale scale{};
  Pair mass;
  if (is_8_bit(precision)) scale = byte_scale(precision, top, reference);
  if (precision == ADAATTN_PRECISION_FLOAT8) {
    mass = masses(!view.all_visible, scratch.scores, count, scale.reference, KeepFloat{scratch.scores}, wanted);
    to_running(scale, mass, wanted);
  } else if (precision == ADAATTN_PRECISION_INT8) {
    mass = masses(!view.all_visible, scratch.scores, count, scale.reference, KeepBytes{tiled.probabilities}, wanted);
    to_running(scale, mass, wanted);
  } else if (precision == ADAATTN_PRECISION_BFLOAT16) {
    mass = masses(!view.all_visible, scratch.scores, count, reference, KeepBFloat16{tiled.probabilities}, wanted);
  } else {
    mass = masses(!view.all_visible, scratch.scores, count, reference, KeepFloat{scratch.scores}, wanted);
  }
  const Pair sum = load_pair(state.sum);
  const FloatVector share = hn::Set(d, rule.drop);
  const bool small = hn::AllTrue(d, hn::Le(mass.low, hn::Mul(share, sum.low))) &&
                     hn::AllTrue(d, hn::Le(mass.high, hn::Mul(share, sum.high)));
  const AddCompensated add_sum{state.sum, state.compensation};
  add_sum.add(0, mass.low);
  add_sum.add(kVectorLanes, mass.high);
  if (wanted != nullptr) {
    const Pair old = load_pair(state.moment);
    store_pair({hn::Add(old.low, moment.low), hn::Add(old.high, moment.high)}, state.moment);
  }
  // What a row with hidden keys does not see must not reach it through the mean, unless it is taken out again.
  const bool summarised = small && view.all_visible;
  if (summarised || is_8_bit(precision)) {
    store_pair(mass, block.masses(index) + listed * kPanelLanes);
    block.list(index)[listed++] = static_cast<std::int32_t>(tile.index);
  }
  if (summarised) {
    tile_class = static_cast<std::uint8_t>(is_low ? ADAATTN_TILE_SUMMARISED_LOW : ADAATTN_TILE_SUMMARISED);
    ++counts.summarised;
    counts.summarised_low += static_cast<std::int64_t>(is_low);
    if (rule.drop == 0 || !accounts_error(plan, panel.rows.first)) return;  // without a share, tiles of mass 0
    if (precision == ADAATTN_PRECISION_INT8 || precision == ADAATTN_PRECISION_BFLOAT16)
      masses(false, scratch.scores, count, reference, KeepFloat{scratch.scores}, nullptr);
    else if (precision == ADAATTN_PRECISION_FLOAT8)
      scale_rows(scratch.scores, count, scale.factor);
    add_summarised_values(account_of(tiled, index, dv), tile.v.data, tile.v.ld, dv, scratch.scores, count);
    return;
  }
  ++(is_low ? counts.low : counts.high);
  add_values(precision, plan, scratch, tiled, keys, panel, tile, count, scale.factor);
}

// out += sum over listed tiles of mass * mean(v).
HWY_NOINLINE void add_means(const ForwardPlan& plan, const Panel& panel, const KeyHead& keys, const BlockTiles& block,
                            std::size_t index) {
  const auto dv = static_cast<std::size_t>(plan.args->v.shape[3]), width = padded_width(plan.args->v.shape[3]);
  for (std::size_t first = 0; first < block.listed[index]; first += kKeyTile) {
    const std::size_t count = std::min(kKeyTile, block.listed[index] - first);
    for (std::size_t i = 0; i < count; ++i)
      std::copy_n(keys.value_means + static_cast<std::size_t>(block.list(index)[first + i]) * width, width,
                  block.scratch->values + i * width);
    AddCompensated add{panel.out, panel.compensation};
    panel_gemm<ALayout::kTransposed>(dv, block.scratch->values, width, block.masses(index) + first * kPanelLanes,
                                     kPanelLanes, count, add);
  }
}

// Attends to the means of kPool keys each of the tiles that the screen left out, 64 at a time.
HWY_NOINLINE void add_pools(const ForwardPlan& plan, const ForwardScratch& scratch, const Panel& panel,
                            const KeyHead& keys, BlockTiles& block, std::size_t index) {
  const FloatTag d;
  const auto dim = static_cast<std::size_t>(plan.args->q.shape[3]),
             dv = static_cast<std::size_t>(plan.args->v.shape[3]), width = padded_width(plan.args->v.shape[3]);
  const TiledScratch& tiled = *block.scratch;
  std::size_t count = 0;
  const auto flush = [&]() HWY_ATTR {
    if (count == 0) return;
    const FloatVector lowest = hn::Set(d, kNegativeInfinity), many = hn::Set(d, 2.77258872F);  // log(kPool)
    Pair top = {lowest, lowest};
    StoreScores store{scratch.scores, &top};
    panel_gemm<ALayout::kRowMajor>(count, tiled.keys, dim, panel.q, kPanelLanes, dim, store);
    for (std::size_t row = 0; row < count; ++row) {
      const Pair score = load_pair(scratch.scores + row * kPanelLanes);
      store_pair({hn::Add(score.low, many), hn::Add(score.high, many)}, scratch.scores + row * kPanelLanes);
    }
    const RowState& state = panel.state;
    const Pair old_reference = load_pair(state.reference);
    bool moved = false;
    const FloatVector low = follow_reference(state.reference, state.top, hn::Add(top.low, many), moved);
    const FloatVector high =
        follow_reference(state.reference + kVectorLanes, state.top + kVectorLanes, hn::Add(top.high, many), moved);
    if (moved) {
      rescale(panel, dv, old_reference, {low, high});
      scale_rows(block.masses(index), block.listed[index], {low, high});
      if (asks_for_masses(*plan.args)) rescale_account(account_of(tiled, index, dv), dv, {low, high});
    }
    const Pair mass =
        tile_mass<false>(scratch.scores, count, load_pair(state.reference), KeepFloat{scratch.scores}, nullptr);
    if (asks_for_masses(*plan.args)) AddRows{account_of(tiled, index, dv).pooled}(0, mass.low, mass.high);
    const AddCompensated add_sum{state.sum, state.compensation};
    add_sum.add(0, mass.low);
    add_sum.add(kVectorLanes, mass.high);
    AddCompensated add{panel.out, panel.compensation};
    panel_gemm<ALayout::kTransposed>(dv, tiled.values, width, scratch.scores, kPanelLanes, count, add);
    count = 0;
  };
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    if (block.classes(index)[tile] != ADAATTN_TILE_POOLED) continue;
    std::copy_n(keys.pooled_keys + tile * kPoolsOfTile * dim, kPoolsOfTile * dim, tiled.keys + count * dim);
    std::copy_n(keys.pooled_values + tile * kPoolsOfTile * width, kPoolsOfTile * width, tiled.values + count * width);
    count += kPoolsOfTile;
    if (count == static_cast<std::size_t>(kClassTile)) flush();
  }
  flush();
}

PanelRows block_rows(const ForwardPlan& plan, std::int64_t task) {
  const std::int64_t first = (plan.blocks - 1 - task) * plan.block;
  return {.b = 0,
          .first_head = 0,
          .nq = plan.args->q.shape[2],
          .first = first,
          .count = std::min(plan.block, plan.rows - first)};
}

// Prepares the panels of a block and classes their tiles.
BlockTiles class_block(const ForwardPlan& plan, const Visibility& visibility, const PanelRows& rows,
                       const KeyHead& keys, const adaattn_head_plan& rule, const ForwardScratch& scratch,
                       const TiledScratch& tiled, TileCounts& counts) {
  const KeyRange range = visible_keys(visibility, rows.first_query(), rows.last_query());
  BlockTiles block = {.tiles = static_cast<std::size_t>((range.end + kClassTile - 1) / kClassTile),
                      .panels = (static_cast<std::size_t>(rows.count) + kPanelLanes - 1) / kPanelLanes,
                      .key_end = range.end,
                      .scratch = &tiled,
                      .listed = {}};
  for (std::size_t p = 0; p < block.panels; ++p) {
    const Panel panel = panel_at(plan, scratch, rows, p);
    begin_panel(plan, scratch, panel);
    class_panel(plan, visibility, panel, keys, rule, block, p, counts);
  }
  return block;
}

// Whether some panel reads q, k and v of the tile as they are: by its precision, or for the account of a summary.
bool reads_float(const ForwardPlan& plan, const PanelRows& rows, const BlockTiles& block, std::size_t tile,
                 const adaattn_head_plan& rule) {
  for (std::size_t p = 0; p < block.panels; ++p) {
    const std::uint8_t c = block.classes(p)[tile];
    const std::int32_t precision = c == ADAATTN_TILE_HIGH ? rule.precision : rule.low_precision;
    const bool as_they_are = precision == ADAATTN_PRECISION_FLOAT32 || is_emulated(precision);
    const bool accounts =
        rule.drop > 0 && accounts_error(plan, rows.first + static_cast<std::int64_t>(p * kPanelLanes));
    if (c >= ADAATTN_TILE_LOW && (as_they_are || accounts)) return true;
  }
  return false;
}

void write_classes(const ForwardPlan& plan, const PanelRows& rows, const BlockTiles& block) {
  const std::size_t tiles = tile_count(*plan.args);
  for (std::size_t p = 0; p < block.panels; ++p) {
    std::uint8_t* to = plan.args->tile_classes + (static_cast<std::size_t>(rows.first) / kPanelLanes + p) * tiles;
    std::copy_n(block.classes(p), block.tiles, to);
    std::fill(to + block.tiles, to + tiles, static_cast<std::uint8_t>(ADAATTN_TILE_HIDDEN));
  }
}

}  // namespace

void class_task(const ForwardPlan& plan, std::int64_t task, const KeyHead& keys, const adaattn_head_plan& rule,
                const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts) {
  const BlockTiles block =
      class_block(plan, visibility_of(plan, 0), block_rows(plan, task), keys, rule, scratch, tiled, counts);
  for (std::size_t p = 0; p < block.panels; ++p) {
    const std::uint8_t* classes = block.classes(p);
    counts.low += std::count(classes, classes + block.tiles, std::uint8_t{ADAATTN_TILE_LOW});
    counts.high += std::count(classes, classes + block.tiles, std::uint8_t{ADAATTN_TILE_HIGH});
  }
}

void tiled_task(const ForwardPlan& plan, std::int64_t task, const KeyHead& keys, const adaattn_head_plan& rule,
                const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts, Account* account) {
  const adaattn_forward_args& args = *plan.args;
  const auto d = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  const PanelRows rows = block_rows(plan, task);
  const Visibility visibility = visibility_of(plan, 0);
  BlockTiles block = class_block(plan, visibility, rows, keys, rule, scratch, tiled, counts);
  for (std::size_t p = 0; p < block.panels; ++p) {
    prepare_queries(copies_of(rule), panel_at(plan, scratch, rows, p).q, d, keys.mean, queries_of(tiled, p, d));
    if (asks_for_masses(args)) begin_account(account_of(tiled, p, dv), dv);
  }
  // Sinks first, then from the diagonal backwards: what comes late is then compared with nearly the whole sum.
  for (std::size_t step = 0; step < block.tiles; ++step) {
    KeyTile tile = {.index = step == 0 ? 0 : block.tiles - step, .first = 0, .k = {}, .v = {}};
    tile.first = static_cast<std::int64_t>(tile.index) * kClassTile;
    if (reads_float(plan, rows, block, tile.index, rule)) {
      const auto count = static_cast<std::size_t>(std::min(kClassTile, block.key_end - tile.first));
      tile.k = float_rows(rows_of(args.k, 0, 0, tile.first), count, d, scratch.k_tile);
      tile.v = float_rows(rows_of(args.v, 0, 0, tile.first), count, dv, scratch.v_tile);
    }
    for (std::size_t p = 0; p < block.panels; ++p)
      if (block.classes(p)[tile.index] >= ADAATTN_TILE_LOW)
        attend_kept_tile(plan, scratch, visibility, panel_at(plan, scratch, rows, p), keys, rule, tile, block, p,
                         counts);
  }
  for (std::size_t p = 0; p < block.panels; ++p) {
    const Panel panel = panel_at(plan, scratch, rows, p);
    if (rule.pooled != 0) add_pools(plan, scratch, panel, keys, block, p);
    add_means(plan, panel, keys, block, p);
    if (asks_for_masses(args)) finish_account(plan, scratch, panel, keys, block, p, *account);
    finish_panel(plan, scratch, panel);
  }
  if (args.tile_classes != nullptr) write_classes(plan, rows, block);
}

std::size_t lanes_of_panel() { return kPanelLanes; }

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(tiled_task);
HWY_EXPORT(class_task);
HWY_EXPORT(lanes_of_panel);

std::size_t panel_rows() { return HWY_DYNAMIC_DISPATCH(lanes_of_panel)(); }

void run_tiled_task(const ForwardPlan& plan, std::int64_t task, const KeyHead& keys, const adaattn_head_plan& rule,
                    const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts, Account* account) {
  HWY_DYNAMIC_DISPATCH(tiled_task)(plan, task, keys, rule, scratch, tiled, counts, account);
}

void run_screen_task(const ForwardPlan& plan, std::int64_t task, const KeyHead& keys, const adaattn_head_plan& rule,
                     const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts) {
  HWY_DYNAMIC_DISPATCH(class_task)(plan, task, keys, rule, scratch, tiled, counts);
}

}  // namespace adaattn::cpu
#endif
