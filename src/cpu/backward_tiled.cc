// Gradients of a tiled forward pass (arXiv 2307.08691, algorithm 2, with classes of tiles). With l the row's sum over
// everything that was not dropped, P = exp(S - log l) and delta = dO . O,
//   high, low    out took P V:                 dP = dO V^T,       dV += P^T dO
//   summarised   out took mass * mean(V):      dP = dO . mean(V), dV of each of its n keys += mass / n * dO
//   pooled       16 keys stood as one with their mean k and v and log 16 on its score: dK and dV of the pool, spread
//                evenly over the 16
//   dropped      nothing
// and dS = P (dP - delta), dQ += dS K, dK += dS^T Q as ever.
//
// Tiles that the forward pass scored in a lower precision are scored in it again, so that their P is what out took;
// the gradient goes straight through the rounding: everything but S is in float32, from q, k and v as they are. The out
// of heads with such tiles has also P and V rounded, and its product with dO is not the sum over P dP any more, which
// is what dS must be free of. So those heads' delta is that sum, in a pass over their tiles before the gradient's
// (docs/decisions/0009-gradients.md).
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
#include "cpu/key_head.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/threads.h"
#include "cpu/tiled.h"
#include "cpu/tiled_gradient-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr std::size_t kBlockPanels = kGradientQueries / kPanelLanes;

// Calls visit(first lane, lanes) for each run of neighbouring panels whose class is wanted.
template <class Wanted, class Visit>
HWY_INLINE void for_each_class_run(const PanelClass* panels, std::size_t queries, Wanted wanted, Visit visit) {
  for (std::size_t p = 0; p * kPanelLanes < queries;) {
    const std::size_t first = p;
    while (p * kPanelLanes < queries && wanted(panels[p].tile_class)) ++p;
    if (p > first) visit(first * kPanelLanes, std::min(p * kPanelLanes, queries) - first * kPanelLanes);
    if (p == first) ++p;
  }
}

// Where a pass over the tiles of a key head adds up: the gradients' has dq, the one before it delta.
struct Sums {
  float* dq;     // [rows][width], or NULL
  float* delta;  // [rows] sum over the row of P dP, or NULL
};

// delta of the panel's rows += sum over keys of ds [keys][kGradientQueries].
HWY_INLINE void add_score_sums(const float* ds, std::size_t keys, std::size_t rows, float* delta) {
  const FloatTag d;
  Pair sum = {hn::Zero(d), hn::Zero(d)};
  for (std::size_t key = 0; key < keys; ++key) {
    const Pair value = load_pair(ds + key * kGradientQueries);
    sum = {hn::Add(sum.low, value.low), hn::Add(sum.high, value.high)};
  }
  float sums[kPanelLanes];
  store_pair(sum, sums);
  for (std::size_t lane = 0; lane < rows; ++lane) delta[lane] += sums[lane];
}

// The block's p and ds times what they go with.
HWY_NOINLINE void add_products(const BackwardPlan& plan, const BackwardScratch& scratch,
                               const TiledGradientScratch& tiled, const PanelClass* panels, std::size_t queries,
                               const GradientTile& tile, const FloatRows& q, const FloatRows& dout, float* dq) {
  const auto rows_from = [](const FloatRows& rows, std::size_t lane) {
    return FloatRows{rows.data + lane * rows.ld, rows.ld};
  };
  const auto dq_from = [&](std::size_t lane) { return dq + lane * plan.width; };
  const std::size_t keys = tile.keys();
  for_each_class_run(
      panels, queries, [](std::uint8_t c) { return c >= ADAATTN_TILE_SUMMARISED; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(keys, scratch.ds + lane, kGradientQueries, rows_from(q, lane), count,
                                        scratch.dk, plan.width);
        add_product<ALayout::kTransposed>(count, scratch.ds + lane, kGradientQueries, tile.k, keys, dq_from(lane),
                                          plan.width);
      });
  for_each_class_run(
      panels, queries, [](std::uint8_t c) { return c == ADAATTN_TILE_HIGH; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(keys, scratch.p + lane, kGradientQueries, rows_from(dout, lane), count,
                                        scratch.dv, plan.width_v);
      });
  for_each_class_run(
      panels, queries, [](std::uint8_t c) { return c == ADAATTN_TILE_SUMMARISED; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(1, tiled.masses + lane, kGradientQueries, rows_from(dout, lane), count,
                                        tiled.mean_gradient, plan.width_v);
      });
  for_each_class_run(
      panels, queries, [](std::uint8_t c) { return c == ADAATTN_TILE_POOLED; },
      [&](std::size_t lane, std::size_t count) HWY_ATTR {
        add_product<ALayout::kRowMajor>(kPoolsOfTile, tiled.pool_ds + lane, kGradientQueries, rows_from(q, lane), count,
                                        tiled.pool_k_gradient, plan.width);
        add_product<ALayout::kTransposed>(count, tiled.pool_ds + lane, kGradientQueries, {tiled.pool_k, plan.width},
                                          kPoolsOfTile, dq_from(lane), plan.width);
        add_product<ALayout::kRowMajor>(kPoolsOfTile, tiled.pool_p + lane, kGradientQueries, rows_from(dout, lane),
                                        count, tiled.pool_v_gradient, plan.width_v);
      });
}

// One block of queries (rows of one head) against one tile.
HWY_NOINLINE void add_tiled_block(const BackwardPlan& plan, const BackwardArrays& arrays,
                                  const BackwardScratch& scratch, const TiledGradientScratch& tiled,
                                  const Visibility& visibility, const PanelRows& block, const GradientTile& tile,
                                  const Sums& sums) {
  const adaattn_backward_args& args = *plan.args;
  const auto queries = static_cast<std::size_t>(block.count);
  const auto dim = static_cast<std::size_t>(args.q.shape[3]), dim_v = static_cast<std::size_t>(args.v.shape[3]);
  PanelClass classes[kBlockPanels + 1];
  PanelRows panels[kBlockPanels + 1];
  bool any = false;
  for (std::size_t lane = 0; lane < queries; lane += kPanelLanes) {
    const std::size_t p = lane / kPanelLanes;
    panels[p] = block;
    panels[p].first += static_cast<std::int64_t>(lane);
    panels[p].count = std::min(static_cast<std::int64_t>(kPanelLanes), block.count - static_cast<std::int64_t>(lane));
    classes[p] = class_of(plan, visibility, panels[p], tile);
    any = any || classes[p].counts();
  }
  if (!any) return;
  const FloatRows q =
      float_rows(rows_of(args.q, block.b, block.first_head, block.first), queries, plan.width, scratch.q);
  const FloatRows dout =
      float_rows(rows_of(args.dout, block.b, block.first_head, block.first), queries, plan.width_v, scratch.dout);
  const std::int64_t first_row = (block.b * args.q.shape[1] + block.first_head) * block.nq + block.first;

  for (std::size_t lane = 0; lane < queries; lane += kPanelLanes) {
    const std::size_t p = lane / kPanelLanes;
    if (!classes[p].counts()) continue;
    const auto count = static_cast<std::size_t>(panels[p].count);
    if (count < kPanelLanes) {
      std::fill_n(scratch.q_panels, dim * kPanelLanes, 0.0F);
      std::fill_n(scratch.dout_panels, dim_v * kPanelLanes, 0.0F);
    }
    transpose(q.data + lane * q.ld, q.ld, count, dim, plan.scale, scratch.q_panels, kPanelLanes);
    transpose(dout.data + lane * dout.ld, dout.ld, count, dim_v, 1.0F, scratch.dout_panels, kPanelLanes);
    const std::int64_t row = first_row + static_cast<std::int64_t>(lane);
    float reference[kPanelLanes] = {}, delta[kPanelLanes] = {};
    std::copy_n(arrays.reference + row, count, reference);
    if (sums.dq != nullptr) std::copy_n(arrays.delta + row, count, delta);
    const PanelGradient panel = {
        .rows = panels[p], .lane = lane, .reference = load_pair(reference), .delta = load_pair(delta)};
    panel_gradient(plan, scratch, tiled, visibility, panel, tile, classes[p]);
    if (sums.dq != nullptr) continue;
    const bool pooled = classes[p].tile_class == ADAATTN_TILE_POOLED;
    add_score_sums((pooled ? tiled.pool_ds : scratch.ds) + lane, pooled ? kPoolsOfTile : tile.keys(), count,
                   sums.delta + row);
  }
  if (sums.dq != nullptr)
    add_products(plan, scratch, tiled, classes, queries, tile, q, dout,
                 sums.dq + first_row * static_cast<std::int64_t>(plan.width));
}

void mean_rows(const FloatRows& rows, std::size_t first, std::size_t count, std::size_t width, float* mean) {
  std::fill_n(mean, width, 0.0F);
  for (std::size_t row = first; row < first + count; ++row)
    for (std::size_t c = 0; c < width; ++c) mean[c] += rows.data[row * rows.ld + c];
  for (std::size_t c = 0; c < width; ++c) mean[c] /= static_cast<float>(count);
}

// What the tile's rounded scores are of: keys less the key head's mean, which tiled.key_mean holds.
void round_tile(const GradientTile& tile, std::size_t width, std::size_t dim, Copies copies,
                const TiledGradientScratch& tiled) {
  for (std::size_t key = 0; key < tile.keys(); ++key)
    for (std::size_t c = 0; c < dim; ++c)
      tiled.centred[key * width + c] = tile.k.data[key * tile.k.ld + c] - tiled.key_mean[c];
  quantize_keys(tiled.centred, width, dim, 0, tile.keys(), copies, tiled.copy);
}

// Means of the tile and of its pools.
void find_means(const BackwardPlan& plan, const GradientTile& tile, const TiledGradientScratch& tiled) {
  if (tile.keys() == 0) return;
  mean_rows(tile.v, 0, tile.keys(), plan.width_v, tiled.mean);
  if (tile.keys() < static_cast<std::size_t>(kClassTile)) return;  // only whole tiles are pooled
  for (std::size_t pool = 0; pool < kPoolsOfTile; ++pool) {
    mean_rows(tile.k, pool * kPool, kPool, plan.width, tiled.pool_k + pool * plan.width);
    mean_rows(tile.v, pool * kPool, kPool, plan.width_v, tiled.pool_v + pool * plan.width_v);
  }
}

void clear_gradients(const BackwardPlan& plan, const BackwardScratch& scratch, const TiledGradientScratch& tiled) {
  std::fill_n(scratch.dk, static_cast<std::size_t>(kClassTile) * plan.width, 0.0F);
  std::fill_n(scratch.dv, static_cast<std::size_t>(kClassTile) * plan.width_v, 0.0F);
  std::fill_n(tiled.mean_gradient, plan.width_v, 0.0F);
  std::fill_n(tiled.pool_k_gradient, kPoolsOfTile * plan.width, 0.0F);
  std::fill_n(tiled.pool_v_gradient, kPoolsOfTile * plan.width_v, 0.0F);
}

// What means were given goes to their keys.
void spread_means(const BackwardPlan& plan, const GradientTile& tile, const BackwardScratch& scratch,
                  const TiledGradientScratch& tiled) {
  constexpr float kShare = 1 / static_cast<float>(kPool);
  for (std::size_t key = 0; key < tile.keys(); ++key) {
    const std::size_t pool = key / kPool;
    for (std::size_t c = 0; c < plan.width; ++c)
      scratch.dk[key * plan.width + c] += kShare * tiled.pool_k_gradient[pool * plan.width + c];
    for (std::size_t c = 0; c < plan.width_v; ++c)
      scratch.dv[key * plan.width_v + c] +=
          tiled.mean_gradient[c] + kShare * tiled.pool_v_gradient[pool * plan.width_v + c];
  }
}

// One pass of a task over its tiles.
void add_tiles(const BackwardPlan& plan, const RoundedHeads& rounded, std::int64_t task, const BackwardArrays& arrays,
               const BackwardScratch& scratch, const TiledGradientScratch& tiled, const Sums& own) {
  const adaattn_backward_args& args = *plan.args;
  const std::int64_t head = task / plan.splits, split = task % plan.splits;
  const std::int64_t b = head / args.k.shape[1], key_head = head % args.k.shape[1];
  const std::int64_t nq = args.q.shape[2], nk = args.k.shape[2], first_head = key_head * plan.group,
                     first_row = (b * args.q.shape[1] + first_head) * nq;
  const Visibility visibility =
      make_visibility(args.options, nq, args.key_lengths != nullptr ? args.key_lengths[b] : nk);
  const auto width = static_cast<std::int64_t>(plan.width);
  if (own.dq != nullptr) std::fill_n(own.dq + first_row * width, plan.group * nq * width, 0.0F);
  if (own.delta != nullptr) std::fill_n(own.delta + first_row, plan.group * nq, 0.0F);
  const auto wanted = [&](std::int64_t h) {
    return own.dq != nullptr || is_rounded(args.plans[b * args.q.shape[1] + h]);
  };
  if (rounded.any) find_key_mean(args.k, b, key_head, visibility.key_count, tiled.key_rows, tiled.key_mean);
  constexpr auto kQueries = static_cast<std::int64_t>(kGradientQueries);
  for (std::int64_t index = split; index < plan.tiles; index += plan.splits) {
    const std::int64_t begin = index * kClassTile, stored_end = std::min(begin + kClassTile, nk);
    GradientTile tile = {.index = index,
                         .first = begin,
                         .end = std::clamp(visibility.key_count, begin, stored_end),  // later keys are never read
                         .k = {},
                         .v = {}};
    tile.k = float_rows(rows_of(args.k, b, key_head, begin), tile.keys(), plan.width, scratch.k);
    tile.v = float_rows(rows_of(args.v, b, key_head, begin), tile.keys(), plan.width_v, scratch.v);
    find_means(plan, tile, tiled);
    if (rounded.any) round_tile(tile, plan.width, static_cast<std::size_t>(args.k.shape[3]), rounded.copies, tiled);
    if (own.dq != nullptr) clear_gradients(plan, scratch, tiled);
    for (std::int64_t h = first_head; h < first_head + plan.group; ++h)
      for (std::int64_t i = 0; i < nq && tile.keys() > 0 && wanted(h); i += kQueries)
        add_tiled_block(plan, arrays, scratch, tiled, visibility,
                        {.b = b, .first_head = h, .nq = nq, .first = i, .count = std::min(kQueries, nq - i)}, tile,
                        own);
    if (own.dq == nullptr) continue;
    spread_means(plan, tile, scratch, tiled);
    const auto keys = static_cast<std::size_t>(stored_end - begin);
    std::fill_n(scratch.factors, keys, plan.scale);
    store_rows(scratch.dk, plan.width, scratch.factors, keys, rows_of(args.dk, b, key_head, begin));
    std::fill_n(scratch.factors, keys, 1.0F);
    store_rows(scratch.dv, plan.width_v, scratch.factors, keys, rows_of(args.dv, b, key_head, begin));
  }
}

}  // namespace

void delta_task(const BackwardPlan& plan, const RoundedHeads& rounded, std::int64_t task, const TiledArrays& arrays,
                const BackwardScratch& scratch, const TiledGradientScratch& tiled) {
  const Sums sums = {.dq = nullptr, .delta = arrays.delta + task % plan.splits * plan.rows};
  add_tiles(plan, rounded, task, arrays.common, scratch, tiled, sums);
}

void gradient_task(const BackwardPlan& plan, const RoundedHeads& rounded, std::int64_t task, const TiledArrays& arrays,
                   const BackwardScratch& scratch, const TiledGradientScratch& tiled) {
  const std::int64_t copy = task % plan.splits * plan.rows * static_cast<std::int64_t>(plan.width);
  const Sums sums = {.dq = arrays.common.dq + copy, .delta = nullptr};
  add_tiles(plan, rounded, task, arrays.common, scratch, tiled, sums);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(delta_task);
HWY_EXPORT(gradient_task);

namespace {

BackwardPlan make_tiled_plan(const adaattn_backward_args& args, int threads) {
  BackwardPlan plan = make_backward_plan(args, threads);
  plan.tiles = (args.k.shape[2] + kClassTile - 1) / kClassTile;
  return plan;
}

void check_forward_pass(const adaattn_backward_args& args) {
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1], panel = static_cast<std::int64_t>(panel_rows());
  for (std::int64_t head = 0; head < heads; ++head) {
    const adaattn_head_plan& plan = args.plans[head];
    if (plan.form != ADAATTN_DENSE && plan.form != ADAATTN_TILED)
      refuse("plans[", head, "].form is ", plan.form,
             ", must be 0 (dense) or 1 (tiled), as a forward pass reports: other forms have no gradient of their own");
    const auto check = [&](const char* field, std::int32_t value) {
      if (value < ADAATTN_PRECISION_FLOAT32 || value > ADAATTN_PRECISION_FLOAT8)
        refuse("plans[", head, "].", field, " is ", value, ", must be 0..4 (adaattn_precision)");
    };
    check("precision", plan.precision);
    check("low_precision", plan.low_precision);
  }
  const std::int64_t count = (args.q.shape[2] + panel - 1) / panel * ((args.k.shape[2] + kClassTile - 1) / kClassTile);
  for (std::int64_t i = 0; i < heads * count; ++i)
    if (args.plans[i / count].form == ADAATTN_TILED && args.tile_classes[i] > ADAATTN_TILE_SUMMARISED_LOW)
      refuse("tile_classes[", i, "] is ", static_cast<int>(args.tile_classes[i]), ", must be in 0..6");
}

void finish_delta(const BackwardPlan& plan, std::int64_t row, const TiledArrays& arrays) {
  if (!is_rounded(plan.args->plans[row / plan.args->q.shape[2]])) return;
  arrays.common.delta[row] = 0;
  for (std::int64_t split = 0; split < plan.splits; ++split)
    arrays.common.delta[row] += arrays.delta[split * plan.rows + row];
}

}  // namespace

std::size_t backward_tiled_workspace(const adaattn_backward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const BackwardPlan plan = make_tiled_plan(args, threads);
  Scratch scratch(nullptr);
  lay_out_tiled_shared(plan, scratch);
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
  const RoundedHeads rounded = rounded_heads(args);
#pragma omp parallel num_threads(threads_for(args.q, args.k, args.v, threads))
  {
    Scratch scratch(args.workspace);
    const TiledArrays shared = lay_out_tiled_shared(plan, scratch);
    BackwardScratch mine{};
    TiledGradientScratch tiled{};
    for (int thread = 0; thread <= omp_get_thread_num(); ++thread) {
      mine = lay_out_thread(plan, scratch);
      tiled = lay_out_tiled_gradient(plan, scratch);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.rows; ++row) prepare_gradient_row(plan, row, shared.common, mine);
    if (rounded.any) {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t task = 0; task < plan.tasks; ++task)
        HWY_DYNAMIC_DISPATCH(delta_task)(plan, rounded, task, shared, mine, tiled);
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < plan.rows; ++row) finish_delta(plan, row, shared);
    }
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < plan.tasks; ++task)
      HWY_DYNAMIC_DISPATCH(gradient_task)(plan, rounded, task, shared, mine, tiled);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.rows; ++row) finish_gradient_row(plan, row, shared.common);
  }
}

}  // namespace adaattn::cpu
#endif
