// Classes the tiles of one panel before any is scored: dropped or pooled, low, or high, by their screened scores.
#if defined(ADAATTN_CPU_SCREEN_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_SCREEN_PANEL_INL_H_
#undef ADAATTN_CPU_SCREEN_PANEL_INL_H_
#else
#define ADAATTN_CPU_SCREEN_PANEL_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/panel-inl.h"
#include "cpu/simd/dot-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/tiled.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// What a block's panels know of the tiles.
struct BlockTiles {
  std::size_t tiles;  // up to the last that the block sees
  std::size_t panels;
  std::int64_t key_end;  // past the last key that the block sees
  const TiledScratch* scratch;
  std::size_t listed[kMaxBlock / kPanelLanes];  // tiles whose mean v counts

  float* masses(std::size_t panel) const { return scratch->masses + panel * tiles * kPanelLanes; }
  std::int32_t* list(std::size_t panel) const { return scratch->lists + panel * tiles; }
  std::uint8_t* classes(std::size_t panel) const { return scratch->classes + panel * tiles; }
};

HWY_INLINE TileView view_class_tile(const Visibility& visibility, const Panel& panel, std::size_t tile,
                                    std::int64_t keys) {
  const std::int64_t begin = static_cast<std::int64_t>(tile) * kClassTile;
  return view_tile(visibility, panel.rows, begin, std::min(begin + kClassTile, keys));
}

// Epilogues of screened scores: only the largest of each lane is kept.
struct KeepTop {
  Pair* top;
  HWY_INLINE KeepTop at(std::size_t) const { return *this; }
  HWY_INLINE void operator()(std::size_t, FloatVector low, FloatVector high) const {
    top->low = hn::Max(top->low, low);
    top->high = hn::Max(top->high, high);
  }
};
struct KeepIntTop {
  IntPair* top;
  HWY_INLINE IntVector start_low() const { return hn::Zero(IntTag()); }
  HWY_INLINE IntVector start_high() const { return hn::Zero(IntTag()); }
  HWY_INLINE KeepIntTop at(std::size_t) const { return *this; }
  HWY_INLINE void operator()(std::size_t, IntVector low, IntVector high) const {
    top->low = hn::Max(top->low, low);
    top->high = hn::Max(top->high, high);
  }
};

// The panel's queries in the screen's coordinates.
struct ScreenedQueries {
  const float* q;          // [kScreenRank][kPanelLanes]
  const std::int32_t* q8;  // [kScreenRank / 4][kPanelLanes]
  Pair scale;
  IntPair bias;
  Pair unseen;  // standard deviation of what the screen does not see of the queries' scores
};

template <bool kNative>
HWY_NOINLINE Pair int8_top(const KeyHead& keys, std::size_t tile, std::size_t first, std::size_t count,
                           const ScreenedQueries& queries) {
  const FloatTag d;
  const IntVector lowest = hn::Set(IntTag(), -(1 << 30));
  IntPair top = {lowest, lowest};
  KeepIntTop keep{&top};
  const std::size_t groups = static_cast<std::size_t>(*keys.rank) / 4;
  const Groups k = {reinterpret_cast<const std::int32_t*>(keys.k8) + first * groups, groups, 1};
  panel_dots<UnsignedRows<kNative>>(count, k, queries.q8, groups, keep);
  const FloatVector scale = hn::Set(d, keys.k8_scale[tile]);
  const auto score = [&](IntVector t, IntVector bias, FloatVector q)
                         HWY_ATTR { return hn::Mul(hn::ConvertTo(d, hn::Add(t, bias)), hn::Mul(q, scale)); };
  return {score(top.low, queries.bias.low, queries.scale.low), score(top.high, queries.bias.high, queries.scale.high)};
}

HWY_INLINE Pair screened_top(const KeyHead& keys, std::size_t tile, std::size_t count, const ScreenedQueries& queries) {
  const std::size_t first = tile * static_cast<std::size_t>(kClassTile);
  if (keys.k8 != nullptr)
    return native_dots().int8 ? int8_top<true>(keys, tile, first, count, queries)
                              : int8_top<false>(keys, tile, first, count, queries);
  const FloatVector lowest = hn::Set(FloatTag(), kNegativeInfinity);
  Pair top = {lowest, lowest};
  KeepTop keep{&top};
  const auto rank = static_cast<std::size_t>(*keys.rank);
  panel_gemm<ALayout::kRowMajor>(count, keys.k + first * rank, rank, queries.q, kPanelLanes, rank, keep);
  return top;
}

HWY_INLINE Pair unseen_scores(const TiledScratch& scratch, const KeyHead& keys, const Panel& panel, std::size_t dim) {
  const FloatTag d;
  const std::size_t width = padded_width(static_cast<std::int64_t>(dim));
  StoreRows<false> store{scratch.spread_q, kPanelLanes};
  panel_gemm<ALayout::kRowMajor>(dim, keys.spread, width, panel.q, kPanelLanes, dim, store);
  Pair sum = {hn::Zero(d), hn::Zero(d)};
  const auto add_products = [&](const float* a, const float* b, std::size_t rows, FloatVector sign) HWY_ATTR {
    for (std::size_t row = 0; row < rows; ++row) {
      const Pair x = load_pair(a + row * kPanelLanes), y = load_pair(b + row * kPanelLanes);
      sum = {hn::MulAdd(hn::Mul(sign, x.low), y.low, sum.low), hn::MulAdd(hn::Mul(sign, x.high), y.high, sum.high)};
    }
  };
  add_products(panel.q, scratch.spread_q, dim, hn::Set(d, 1.0F));
  add_products(scratch.screened_q, scratch.screened_q, static_cast<std::size_t>(*keys.rank), hn::Set(d, -1.0F));
  const FloatVector zero = hn::Zero(d), one = hn::Set(d, 1 / std::max(1.0F, *keys.sampled));
  return {hn::Sqrt(hn::Mul(one, hn::Max(sum.low, zero))), hn::Sqrt(hn::Mul(one, hn::Max(sum.high, zero)))};
}

HWY_INLINE ScreenedQueries screen_queries(const TiledScratch& scratch, const KeyHead& keys, const Panel& panel,
                                          std::size_t dim) {
  StoreRows<false> store{scratch.screened_q, kPanelLanes};
  panel_gemm<ALayout::kTransposed>(static_cast<std::size_t>(*keys.rank), keys.z, kScreenRank, panel.q, kPanelLanes, dim,
                                   store);
  ScreenedQueries queries = {.q = scratch.screened_q,
                             .q8 = scratch.screened_q8,
                             .scale = {},
                             .bias = {},
                             .unseen = unseen_scores(scratch, keys, panel, dim)};
  if (keys.k8 == nullptr) return queries;
  float scale[kPanelLanes];
  std::int32_t bias[kPanelLanes];
  quantize_queries(scratch.screened_q, static_cast<std::size_t>(*keys.rank), scratch.screened_q8, scale, bias);
  queries.scale = load_pair(scale);
  queries.bias = load_int_pair(bias);
  return queries;
}

HWY_INLINE bool all_below(Pair top, Pair limit) {  // false if there is a NaN
  const FloatTag d;
  return hn::AllTrue(d, hn::Lt(top.low, limit.low)) && hn::AllTrue(d, hn::Lt(top.high, limit.high));
}

// A tile is left out only if it lies below the threshold by this many standard deviations of what the screen does not
// see of a query's scores: queries in directions that it sees badly keep more.
constexpr float kUnseenMargin = 2;

// Classes are ADAATTN_TILE_HIDDEN, DROPPED, POOLED, LOW and HIGH. The first tile, the last that is seen and those that
// only part of the rows see are never left out, nor are those before them: rows at the start of a tile find their
// neighbours there. Nor are those of which one value stands out.
inline HWY_NOINLINE void class_panel(const ForwardPlan& plan, const Visibility& visibility, const Panel& panel,
                                     const KeyHead& keys, const adaattn_head_plan& rule, const BlockTiles& block,
                                     std::size_t index, TileCounts& counts) {
  const FloatTag d;
  const TiledScratch& scratch = *block.scratch;
  std::uint8_t* classes = block.classes(index);
  const bool screened = is_screened(rule);
  const std::uint8_t unseen = rule.low < 0 ? ADAATTN_TILE_HIGH : ADAATTN_TILE_LOW;  // of tiles without a score
  ScreenedQueries queries{};
  if (screened) queries = screen_queries(scratch, keys, panel, static_cast<std::size_t>(plan.args->q.shape[3]));
  const FloatVector lowest = hn::Set(d, kNegativeInfinity);
  Pair best = {lowest, lowest};
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    const TileView view = view_class_tile(visibility, panel, tile, plan.args->k.shape[2]);
    const bool seen = view.begin < view.end;
    classes[tile] = seen ? unseen : static_cast<std::uint8_t>(ADAATTN_TILE_HIDDEN);
    counts.visible += static_cast<std::int64_t>(seen);
    if (!seen || !screened || !view.all_visible) continue;  // a best score may be of a key that a row does not see
    const Pair top = screened_top(keys, tile, static_cast<std::size_t>(view.end - view.begin), queries);
    store_pair(top, scratch.tops + tile * kPanelLanes);
    best = {hn::Max(best.low, top.low), hn::Max(best.high, top.high)};
  }
  if (!screened) return;
  const auto limit = [&](float below) HWY_ATTR {
    const FloatVector margin = hn::Set(d, below);
    return Pair{hn::Add(best.low, margin), hn::Add(best.high, margin)};
  };
  const FloatVector deviations = hn::Set(d, -kUnseenMargin);
  const Pair seen = limit(rule.screen), low = limit(rule.low);
  const Pair leave = {hn::MulAdd(deviations, queries.unseen.low, seen.low),
                      hn::MulAdd(deviations, queries.unseen.high, seen.high)};
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    if (classes[tile] == ADAATTN_TILE_HIDDEN) continue;
    if (!view_class_tile(visibility, panel, tile, plan.args->k.shape[2]).all_visible) continue;
    const Pair top = load_pair(scratch.tops + tile * kPanelLanes);
    const bool inner = tile > 0 && tile + 1 < block.tiles && !keys.stands_out[tile] &&
                       view_class_tile(visibility, panel, tile + 1, plan.args->k.shape[2]).all_visible;
    if (inner && all_below(top, leave)) {
      classes[tile] = static_cast<std::uint8_t>(rule.pooled != 0 ? ADAATTN_TILE_POOLED : ADAATTN_TILE_DROPPED);
      ++(rule.pooled != 0 ? counts.pooled : counts.dropped);
    } else if (rule.low < 0) {
      classes[tile] = static_cast<std::uint8_t>(all_below(top, low) ? ADAATTN_TILE_LOW : ADAATTN_TILE_HIGH);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
