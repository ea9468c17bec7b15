// P and dS of one panel of queries against one tile of keys, by the tile's class and in the forward pass's precision.
#if defined(ADAATTN_CPU_TILED_GRADIENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_TILED_GRADIENT_INL_H_
#undef ADAATTN_CPU_TILED_GRADIENT_INL_H_
#else
#define ADAATTN_CPU_TILED_GRADIENT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>

#include "cpu/backward_tiled_plan.h"
#include "cpu/gradient-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/tile_scores-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

struct GradientTile {
  std::int64_t index, first, end;  // end: past the last key that exists
  FloatRows k, v;
  std::size_t keys() const { return static_cast<std::size_t>(end - first); }
};

struct PanelClass {
  std::uint8_t tile_class;  // adaattn_tile_class, without ADAATTN_TILE_LOW and ADAATTN_TILE_SUMMARISED_LOW
  std::int32_t precision;   // adaattn_precision of the scores
  TileView view;

  bool counts() const { return tile_class > ADAATTN_TILE_DROPPED; }
};

// The panel's class for the gradient. A summarised tile that some row sees only in part, which no forward pass yields,
// is as a high one.
inline PanelClass class_of(const BackwardPlan& plan, const Visibility& visibility, const PanelRows& panel,
                           const GradientTile& tile) {
  const adaattn_backward_args& args = *plan.args;
  const TileView view = view_tile(visibility, panel, tile.first, tile.end);
  const std::int64_t head = panel.b * args.q.shape[1] + panel.first_head;
  const adaattn_head_plan& rule = args.plans[head];
  if (view.begin >= view.end) return {ADAATTN_TILE_HIDDEN, rule.precision, view};
  if (rule.form == ADAATTN_DENSE) return {ADAATTN_TILE_HIGH, rule.precision, view};
  constexpr auto kRows = static_cast<std::int64_t>(kPanelLanes);
  const std::int64_t panels = (args.q.shape[2] + kRows - 1) / kRows, tiles = plan.tiles;
  const std::uint8_t given = args.tile_classes[(head * panels + panel.first / kRows) * tiles + tile.index];
  const bool is_low = given == ADAATTN_TILE_LOW || given == ADAATTN_TILE_SUMMARISED_LOW;
  const bool summarised = given == ADAATTN_TILE_SUMMARISED || given == ADAATTN_TILE_SUMMARISED_LOW;
  const bool whole = view.all_visible && view.begin == tile.first && view.end == tile.end;
  const std::uint8_t kept = summarised && whole ? ADAATTN_TILE_SUMMARISED : ADAATTN_TILE_HIGH;
  return {is_low || summarised ? kept : given, is_low ? rule.low_precision : rule.precision, view};
}

struct PanelGradient {
  PanelRows rows;
  std::size_t lane;  // of the block
  Pair reference, delta;
};

// values . matrix rows: out[lane] = sum over c of column[c] * panel[c][lane].
HWY_INLINE Pair weigh_rows(const float* column, const float* panel, std::size_t count) {
  const FloatTag d;
  Pair sum = {hn::Zero(d), hn::Zero(d)};
  for (std::size_t c = 0; c < count; ++c) {
    const FloatVector value = hn::Set(d, column[c]);
    const Pair row = load_pair(panel + c * kPanelLanes);
    sum = {hn::MulAdd(value, row.low, sum.low), hn::MulAdd(value, row.high, sum.high)};
  }
  return sum;
}

// The panel's queries are in scratch.q_panels, the tile's rounded keys in tiled.copy.
HWY_INLINE void gradient_scores(const BackwardPlan& plan, const BackwardScratch& scratch,
                                const TiledGradientScratch& tiled, const GradientTile& tile, std::int32_t precision) {
  const auto dim = static_cast<std::size_t>(plan.args->q.shape[3]);
  const ScoredKeys keys = {
      .count = tile.keys(), .dim = dim, .rows = tile.k, .mean = tiled.key_mean, .copy = tiled.copy, .first = 0};
  float* values = tiled.query_values;
  const PanelQueries queries = {.q8 = tiled.q8,
                                .q16 = tiled.q16,
                                .bias = reinterpret_cast<std::int32_t*>(values),
                                .q8_scale = values + kPanelLanes,
                                .offset = values + 2 * kPanelLanes};
  if (precision != ADAATTN_PRECISION_FLOAT32)
    prepare_queries({.int8 = precision == ADAATTN_PRECISION_INT8, .bfloat16 = precision == ADAATTN_PRECISION_BFLOAT16},
                    scratch.q_panels, dim, tiled.key_mean, queries);
  tile_scores(precision, keys, scratch.q_panels, queries, {tiled.emulated_k, tiled.emulated_q}, scratch.scores);
}

// P of the panel's rows against the whole tile, hidden keys 0.
HWY_INLINE void tile_probabilities(const BackwardPlan& plan, const BackwardScratch& scratch,
                                   const TiledGradientScratch& tiled, const Visibility& visibility,
                                   const PanelGradient& panel, const GradientTile& tile, const PanelClass& what,
                                   float* p) {
  gradient_scores(plan, scratch, tiled, tile, what.precision);
  if (what.view.all_visible && what.view.begin == tile.first && what.view.end == tile.end)
    return recompute_probabilities<false>(scratch.scores, tile.keys(), panel.reference, p, kGradientQueries);
  const LaneBounds<kPanelLanes> bounds(visibility, panel.rows, tile.first);
  mask_scores(scratch.scores, tile.keys(), 0, bounds, nullptr);
  recompute_probabilities<true>(scratch.scores, tile.keys(), panel.reference, p, kGradientQueries);
}

// dS of a summarised tile, and its masses over the keys.
HWY_INLINE void summary_gradient(const BackwardPlan& plan, const BackwardScratch& scratch,
                                 const TiledGradientScratch& tiled, const PanelGradient& panel,
                                 const GradientTile& tile) {
  const FloatTag d;
  const Pair towards = weigh_rows(tiled.mean, scratch.dout_panels, static_cast<std::size_t>(plan.args->v.shape[3]));
  const Pair factor = {hn::Sub(towards.low, panel.delta.low), hn::Sub(towards.high, panel.delta.high)};
  Pair mass = {hn::Zero(d), hn::Zero(d)};
  for (std::size_t key = 0; key < tile.keys(); ++key) {
    const Pair p = load_pair(scratch.p + key * kGradientQueries + panel.lane);
    mass = {hn::Add(mass.low, p.low), hn::Add(mass.high, p.high)};
    store_pair({hn::Mul(p.low, factor.low), hn::Mul(p.high, factor.high)},
               scratch.ds + key * kGradientQueries + panel.lane);
  }
  const FloatVector share = hn::Set(d, 1 / static_cast<float>(tile.keys()));
  store_pair({hn::Mul(mass.low, share), hn::Mul(mass.high, share)}, tiled.masses + panel.lane);
}

// P and dS of a tile's pools.
HWY_INLINE void pool_gradient(const BackwardPlan& plan, const BackwardScratch& scratch,
                              const TiledGradientScratch& tiled, const PanelGradient& panel) {
  const FloatTag d;
  Pair top = {hn::Zero(d), hn::Zero(d)};
  StoreScores store_scores{scratch.scores, &top};
  panel_gemm<ALayout::kRowMajor>(kPoolsOfTile, tiled.pool_k, plan.width, scratch.q_panels, kPanelLanes,
                                 static_cast<std::size_t>(plan.args->q.shape[3]), store_scores);
  const FloatVector many = hn::Set(d, 4.0F);  // log2(kPool)
  const Pair reference = {hn::Sub(panel.reference.low, many), hn::Sub(panel.reference.high, many)};
  float* p = tiled.pool_p + panel.lane;
  recompute_probabilities<false>(scratch.scores, kPoolsOfTile, reference, p, kGradientQueries);
  StoreScoreGradient store_gradient{p, tiled.pool_ds + panel.lane, kGradientQueries, panel.delta};
  panel_gemm<ALayout::kRowMajor>(kPoolsOfTile, tiled.pool_v, plan.width_v, scratch.dout_panels, kPanelLanes,
                                 static_cast<std::size_t>(plan.args->v.shape[3]), store_gradient);
}

// Fills the panel's lanes of p and ds, or of pool_p and pool_ds.
inline HWY_NOINLINE void panel_gradient(const BackwardPlan& plan, const BackwardScratch& scratch,
                                        const TiledGradientScratch& tiled, const Visibility& visibility,
                                        const PanelGradient& panel, const GradientTile& tile, const PanelClass& what) {
  if (what.tile_class == ADAATTN_TILE_POOLED) return pool_gradient(plan, scratch, tiled, panel);
  tile_probabilities(plan, scratch, tiled, visibility, panel, tile, what, scratch.p + panel.lane);
  if (what.tile_class == ADAATTN_TILE_SUMMARISED) return summary_gradient(plan, scratch, tiled, panel, tile);
  StoreScoreGradient store_gradient{scratch.p + panel.lane, scratch.ds + panel.lane, kGradientQueries, panel.delta};
  panel_gemm<ALayout::kRowMajor>(tile.keys(), tile.v.data, tile.v.ld, scratch.dout_panels, kPanelLanes,
                                 static_cast<std::size_t>(plan.args->v.shape[3]), store_gradient);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
