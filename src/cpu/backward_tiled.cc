// Gradients of a tiled forward pass (arXiv 2307.08691, algorithm 2, with classes of tiles). With l the row's sum over
// everything that was not dropped, P = exp(S - log l) and delta = dO . O,
//   high, low    out took P V:                 dP = dO V^T,       dV += P^T dO
//   summarised   out took mass * mean(V):      dP = dO . mean(V), dV of each of its n keys += mass / n * dO
//   pooled       16 keys stood as one with their mean k and v and log 16 on its score: dK and dV of the pool, spread
//                evenly over the 16
//   dropped      nothing
// and dS = P (dP - delta), dQ += dS K, dK += dS^T Q as ever. Scores of low tiles are computed again in float32 and
// stand for those the forward pass rounded (a straight-through gradient).
#include "cpu/backward_tiled.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_tiled.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "cpu/backward_plan.h"
#include "cpu/backward_tiled_plan.h"
#include "cpu/gradient-inl.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/threads.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

struct Tile {
  std::int64_t index, first, end;  // end: past the last key that exists
  FloatRows k, v;
  std::size_t keys() const { return static_cast<std::size_t>(end - first); }
};

// The panel's class for the gradient: low tiles are as high ones, and so is a summarised tile that some row sees only
// in part, which no forward pass yields.
std::uint8_t class_of(const BackwardPlan& plan, const PanelRows& panel, const Tile& tile, const TileView& view) {
  const adaattn_backward_args& args = *plan.args;
  if (view.begin >= view.end) return ADAATTN_TILE_HIDDEN;
  const std::int64_t head = panel.b * args.q.shape[1] + panel.first_head;
  if (args.plans[head].form == ADAATTN_DENSE) return ADAATTN_TILE_HIGH;
  constexpr auto kRows = static_cast<std::int64_t>(kPanelLanes);
  const std::int64_t panels = (args.q.shape[2] + kRows - 1) / kRows, tiles = plan.tiles;
  const std::uint8_t given = args.tile_classes[(head * panels + panel.first / kRows) * tiles + tile.index];
  const bool whole = view.all_visible && view.begin == tile.first && view.end == tile.end;
  if (given == ADAATTN_TILE_LOW || (given == ADAATTN_TILE_SUMMARISED && !whole)) return ADAATTN_TILE_HIGH;
  return given;
}

constexpr std::size_t kBlockPanels = kGradientQueries / kPanelLanes;

// Calls visit(first lane, lanes) for each run of neighbouring panels whose class is wanted.
template <class Wanted, class Visit>
HWY_INLINE void for_each_class_run(const std::uint8_t* classes, std::size_t queries, Wanted wanted, Visit visit) {
  for (std::size_t p = 0; p * kPanelLanes < queries;) {
    const std::size_t first = p;
    while (p * kPanelLanes < queries && wanted(classes[p])) ++p;
    if (p > first) visit(first * kPanelLanes, std::min(p * kPanelLanes, queries) - first * kPanelLanes);
    if (p == first) ++p;
  }
}

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

struct PanelGradient {
  PanelRows rows;
  std::size_t lane;  // of the block
  Pair reference, delta;
};

// P of the panel's rows against the whole tile, hidden keys 0.
HWY_INLINE void tile_probabilities(const BackwardPlan& plan, const BackwardScratch& scratch,
                                   const Visibility& visibility, const PanelGradient& panel, const Tile& tile,
                                   const TileView& view, float* p, std::size_t ld) {
  const FloatTag d;
  Pair top = {hn::Zero(d), hn::Zero(d)};
  StoreScores store_scores{scratch.scores, &top};
  panel_gemm<ALayout::kRowMajor>(tile.keys(), tile.k.data, tile.k.ld, scratch.q_panels, kPanelLanes,
                                 static_cast<std::size_t>(plan.args->q.shape[3]), store_scores);
  if (view.all_visible && view.begin == tile.first && view.end == tile.end)
    return recompute_probabilities<false>(scratch.scores, tile.keys(), panel.reference, p, ld);
  const LaneBounds<kPanelLanes> bounds(visibility, panel.rows, tile.first);
  mask_scores(scratch.scores, tile.keys(), 0, bounds, nullptr);
  recompute_probabilities<true>(scratch.scores, tile.keys(), panel.reference, p, ld);
}

// dS of a summarised tile, and its masses over the keys.
HWY_INLINE void summary_gradient(const BackwardPlan& plan, const BackwardScratch& scratch,
                                 const TiledGradientScratch& tiled, const PanelGradient& panel, const Tile& tile) {
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
  panel_gemm<ALayout::kRowMajor>(kPools, tiled.pool_k, plan.width, scratch.q_panels, kPanelLanes,
                                 static_cast<std::size_t>(plan.args->q.shape[3]), store_scores);
  const FloatVector many = hn::Set(d, 4.0F);  // log2(kPoolKeys)
  const Pair reference = {hn::Sub(panel.reference.low, many), hn::Sub(panel.reference.high, many)};
  float* p = tiled.pool_p + panel.lane;
  recompute_probabilities<false>(scratch.scores, kPools, reference, p, kGradientQueries);
  StoreScoreGradient store_gradient{p, tiled.pool_ds + panel.lane, kGradientQueries, panel.delta};
  panel_gemm<ALayout::kRowMajor>(kPools, tiled.pool_v, plan.width_v, scratch.dout_panels, kPanelLanes,
                                 static_cast<std::size_t>(plan.args->v.shape[3]), store_gradient);
}

// One block of queries (rows of one head) against one tile.
HWY_NOINLINE void add_tiled_block(const BackwardPlan& plan, const BackwardArrays& arrays,
                                  const BackwardScratch& scratch, const TiledGradientScratch& tiled,
                                  const Visibility& visibility, const PanelRows& block, const Tile& tile, float* dq) {
  const adaattn_backward_args& args = *plan.args;
  const auto queries = static_cast<std::size_t>(block.count);
  const auto dim = static_cast<std::size_t>(args.q.shape[3]), dim_v = static_cast<std::size_t>(args.v.shape[3]);
  std::uint8_t classes[kBlockPanels + 1] = {};
  TileView views[kBlockPanels + 1];
  PanelRows panels[kBlockPanels + 1];
  bool any = false;
  for (std::size_t lane = 0; lane < queries; lane += kPanelLanes) {
    const std::size_t p = lane / kPanelLanes;
    panels[p] = block;
    panels[p].first += static_cast<std::int64_t>(lane);
    panels[p].count = std::min(static_cast<std::int64_t>(kPanelLanes), block.count - static_cast<std::int64_t>(lane));
    views[p] = view_tile(visibility, panels[p], tile.first, tile.end);
    classes[p] = class_of(plan, panels[p], tile, views[p]);
    any = any || classes[p] > ADAATTN_TILE_DROPPED;
  }
  if (!any) return;
  const FloatRows q =
      float_rows(rows_of(args.q, block.b, block.first_head, block.first), queries, plan.width, scratch.q);
  const FloatRows dout =
      float_rows(rows_of(args.dout, block.b, block.first_head, block.first), queries, plan.width_v, scratch.dout);
  const std::int64_t first_row = (block.b * args.q.shape[1] + block.first_head) * block.nq + block.first;

  for (std::size_t lane = 0; lane < queries; lane += kPanelLanes) {
    const std::size_t p = lane / kPanelLanes;
    if (classes[p] <= ADAATTN_TILE_DROPPED) continue;
    const auto count = static_cast<std::size_t>(panels[p].count);
    if (count < kPanelLanes) {
      std::fill_n(scratch.q_panels, dim * kPanelLanes, 0.0F);
      std::fill_n(scratch.dout_panels, dim_v * kPanelLanes, 0.0F);
    }
    transpose(q.data + lane * q.ld, q.ld, count, dim, plan.scale, scratch.q_panels, kPanelLanes);
    transpose(dout.data + lane * dout.ld, dout.ld, count, dim_v, 1.0F, scratch.dout_panels, kPanelLanes);
    float reference[kPanelLanes] = {}, delta[kPanelLanes] = {};
    std::copy_n(arrays.reference + first_row + static_cast<std::int64_t>(lane), count, reference);
    std::copy_n(arrays.delta + first_row + static_cast<std::int64_t>(lane), count, delta);
    const PanelGradient panel = {
        .rows = panels[p], .lane = lane, .reference = load_pair(reference), .delta = load_pair(delta)};
    if (classes[p] == ADAATTN_TILE_POOLED) {
      pool_gradient(plan, scratch, tiled, panel);
      continue;
    }
    tile_probabilities(plan, scratch, visibility, panel, tile, views[p], scratch.p + lane, kGradientQueries);
    if (classes[p] == ADAATTN_TILE_SUMMARISED) {
      summary_gradient(plan, scratch, tiled, panel, tile);
      continue;
    }
    StoreScoreGradient store_gradient{scratch.p + lane, scratch.ds + lane, kGradientQueries, panel.delta};
    panel_gemm<ALayout::kRowMajor>(tile.keys(), tile.v.data, tile.v.ld, scratch.dout_panels, kPanelLanes, dim_v,
                                   store_gradient);
  }

  const auto rows_from = [](const FloatRows& rows, std::size_t lane) {
    return FloatRows{rows.data + lane * rows.ld, rows.ld};
  };
  const auto dq_from = [&](std::size_t lane) {
    return dq + (first_row + static_cast<std::int64_t>(lane)) * static_cast<std::int64_t>(plan.width);
  };
  const std::size_t keys = tile.keys();
  for_each_class_run(
      classes, queries, [](std::uint8_t c) { return c >= ADAATTN_TILE_SUMMARISED; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(keys, scratch.ds + lane, kGradientQueries, rows_from(q, lane), count,
                                        scratch.dk, plan.width);
        add_product<ALayout::kTransposed>(count, scratch.ds + lane, kGradientQueries, tile.k, keys, dq_from(lane),
                                          plan.width);
      });
  for_each_class_run(
      classes, queries, [](std::uint8_t c) { return c == ADAATTN_TILE_HIGH; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(keys, scratch.p + lane, kGradientQueries, rows_from(dout, lane), count,
                                        scratch.dv, plan.width_v);
      });
  for_each_class_run(
      classes, queries, [](std::uint8_t c) { return c == ADAATTN_TILE_SUMMARISED; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(1, tiled.masses + lane, kGradientQueries, rows_from(dout, lane), count,
                                        tiled.mean_gradient, plan.width_v);
      });
  for_each_class_run(
      classes, queries, [](std::uint8_t c) { return c == ADAATTN_TILE_POOLED; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(kPools, tiled.pool_ds + lane, kGradientQueries, rows_from(q, lane), count,
                                        tiled.pool_k_gradient, plan.width);
        add_product<ALayout::kTransposed>(count, tiled.pool_ds + lane, kGradientQueries, {tiled.pool_k, plan.width},
                                          kPools, dq_from(lane), plan.width);
        add_product<ALayout::kRowMajor>(kPools, tiled.pool_p + lane, kGradientQueries, rows_from(dout, lane), count,
                                        tiled.pool_v_gradient, plan.width_v);
      });
}

void mean_rows(const FloatRows& rows, std::size_t first, std::size_t count, std::size_t width, float* mean) {
  std::fill_n(mean, width, 0.0F);
  for (std::size_t row = first; row < first + count; ++row)
    for (std::size_t c = 0; c < width; ++c) mean[c] += rows.data[row * rows.ld + c];
  for (std::size_t c = 0; c < width; ++c) mean[c] /= static_cast<float>(count);
}

// Means of the tile and of its pools; their gradients start at 0.
void begin_tile(const BackwardPlan& plan, const Tile& tile, const BackwardScratch& scratch,
                const TiledGradientScratch& tiled) {
  std::fill_n(scratch.dk, static_cast<std::size_t>(kGradientTile) * plan.width, 0.0F);
  std::fill_n(scratch.dv, static_cast<std::size_t>(kGradientTile) * plan.width_v, 0.0F);
  std::fill_n(tiled.mean_gradient, plan.width_v, 0.0F);
  std::fill_n(tiled.pool_k_gradient, kPools * plan.width, 0.0F);
  std::fill_n(tiled.pool_v_gradient, kPools * plan.width_v, 0.0F);
  if (tile.keys() == 0) return;
  mean_rows(tile.v, 0, tile.keys(), plan.width_v, tiled.mean);
  if (tile.keys() < static_cast<std::size_t>(kGradientTile)) return;  // only whole tiles are pooled
  for (std::size_t pool = 0; pool < kPools; ++pool) {
    mean_rows(tile.k, pool * kPoolKeys, kPoolKeys, plan.width, tiled.pool_k + pool * plan.width);
    mean_rows(tile.v, pool * kPoolKeys, kPoolKeys, plan.width_v, tiled.pool_v + pool * plan.width_v);
  }
}

// What means were given goes to their keys.
void spread_means(const BackwardPlan& plan, const Tile& tile, const BackwardScratch& scratch,
                  const TiledGradientScratch& tiled) {
  constexpr float kShare = 1 / static_cast<float>(kPoolKeys);
  for (std::size_t key = 0; key < tile.keys(); ++key) {
    const std::size_t pool = key / kPoolKeys;
    for (std::size_t c = 0; c < plan.width; ++c)
      scratch.dk[key * plan.width + c] += kShare * tiled.pool_k_gradient[pool * plan.width + c];
    for (std::size_t c = 0; c < plan.width_v; ++c)
      scratch.dv[key * plan.width_v + c] +=
          tiled.mean_gradient[c] + kShare * tiled.pool_v_gradient[pool * plan.width_v + c];
  }
}

}  // namespace

void tiled_gradient_task(const BackwardPlan& plan, std::int64_t task, const BackwardArrays& arrays,
                         const BackwardScratch& scratch, const TiledGradientScratch& tiled) {
  const adaattn_backward_args& args = *plan.args;
  const std::int64_t head = task / plan.splits, split = task % plan.splits;
  const std::int64_t b = head / args.k.shape[1], key_head = head % args.k.shape[1];
  const std::int64_t nq = args.q.shape[2], nk = args.k.shape[2], first_head = key_head * plan.group;
  const Visibility visibility =
      make_visibility(args.options, nq, args.key_lengths != nullptr ? args.key_lengths[b] : nk);
  float* dq = arrays.dq + split * plan.rows * static_cast<std::int64_t>(plan.width);
  std::fill_n(dq + (b * args.q.shape[1] + first_head) * nq * static_cast<std::int64_t>(plan.width),
              plan.group * nq * static_cast<std::int64_t>(plan.width), 0.0F);
  constexpr auto kQueries = static_cast<std::int64_t>(kGradientQueries);
  for (std::int64_t index = split; index < plan.tiles; index += plan.splits) {
    const std::int64_t begin = index * kGradientTile, stored_end = std::min(begin + kGradientTile, nk);
    Tile tile = {.index = index,
                 .first = begin,
                 .end = std::clamp(visibility.key_count, begin, stored_end),  // keys past the length are never read
                 .k = {},
                 .v = {}};
    tile.k = float_rows(rows_of(args.k, b, key_head, begin), tile.keys(), plan.width, scratch.k);
    tile.v = float_rows(rows_of(args.v, b, key_head, begin), tile.keys(), plan.width_v, scratch.v);
    begin_tile(plan, tile, scratch, tiled);
    if (tile.keys() > 0)
      for (std::int64_t h = first_head; h < first_head + plan.group; ++h)
        for (std::int64_t i = 0; i < nq; i += kQueries)
          add_tiled_block(plan, arrays, scratch, tiled, visibility,
                          {.b = b, .first_head = h, .nq = nq, .first = i, .count = std::min(kQueries, nq - i)}, tile,
                          dq);
    spread_means(plan, tile, scratch, tiled);
    const auto keys = static_cast<std::size_t>(stored_end - begin);
    std::fill_n(scratch.factors, keys, plan.scale);
    store_rows(scratch.dk, plan.width, scratch.factors, keys, rows_of(args.dk, b, key_head, begin));
    std::fill_n(scratch.factors, keys, 1.0F);
    store_rows(scratch.dv, plan.width_v, scratch.factors, keys, rows_of(args.dv, b, key_head, begin));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(tiled_gradient_task);

namespace {

BackwardPlan make_tiled_plan(const adaattn_backward_args& args, int threads) {
  BackwardPlan plan = make_backward_plan(args, threads);
  plan.tiles = (args.k.shape[2] + kGradientTile - 1) / kGradientTile;
  return plan;
}

void check_forward_pass(const adaattn_backward_args& args) {
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1], panel = adaattn_panel_rows();
  for (std::int64_t head = 0; head < heads; ++head) {
    const std::int32_t form = args.plans[head].form;
    if (form != ADAATTN_DENSE && form != ADAATTN_TILED)
      refuse("plans[", head, "].form is ", form,
             ", must be 0 (dense) or 1 (tiled), as a forward pass reports: other forms have no gradient of their own");
  }
  const std::int64_t count =
      (args.q.shape[2] + panel - 1) / panel * ((args.k.shape[2] + kGradientTile - 1) / kGradientTile);
  for (std::int64_t i = 0; i < heads * count; ++i)
    if (args.plans[i / count].form == ADAATTN_TILED && args.tile_classes[i] > ADAATTN_TILE_HIGH)
      refuse("tile_classes[", i, "] is ", static_cast<int>(args.tile_classes[i]), ", must be in 0..5");
}

}  // namespace

std::size_t backward_tiled_workspace(const adaattn_backward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const BackwardPlan plan = make_tiled_plan(args, threads);
  Scratch scratch(nullptr);
  lay_out_shared(plan, scratch);
  for (int thread = 0; thread < threads; ++thread) {
    lay_out_thread(plan, scratch);
    lay_out_tiled_gradient(plan, scratch);
  }
  return scratch.bytes();
}

void backward_tiled(const adaattn_backward_args& args) {
  check_forward_pass(args);
  const int threads = thread_count(args.options.num_threads);
  const BackwardPlan plan = make_tiled_plan(args, threads);
#pragma omp parallel num_threads(threads_for(args.q, args.k, args.v, threads))
  {
    Scratch scratch(args.workspace);
    const BackwardArrays arrays = lay_out_shared(plan, scratch);
    BackwardScratch mine{};
    TiledGradientScratch tiled{};
    for (int thread = 0; thread <= omp_get_thread_num(); ++thread) {
      mine = lay_out_thread(plan, scratch);
      tiled = lay_out_tiled_gradient(plan, scratch);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.rows; ++row) prepare_gradient_row(plan, row, arrays, mine);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < plan.tasks; ++task)
      HWY_DYNAMIC_DISPATCH(tiled_gradient_task)(plan, task, arrays, mine, tiled);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.rows; ++row) finish_gradient_row(plan, row, arrays);
  }
}

}  // namespace adaattn::cpu
#endif
