#include "cpu/droppable.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/droppable.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/visibility.h"
#include "cpu/forward_plan.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/rows.h"
#include "cpu/screen_panel-inl.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

// Every third tile, and all of the last four: rows find their best scores near themselves or at the first keys.
std::int64_t next_tile(std::int64_t tile, std::int64_t tiles) {
  return tile + 4 >= tiles ? tile + 1 : std::min(tile + 3, tiles - 4);
}

}  // namespace

double droppable_for_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t head, float below,
                            const KeyHeadScratch& scratch) {
  const FloatTag d;
  const auto dim = static_cast<std::size_t>(args.q.shape[3]);
  constexpr auto kLanes = static_cast<std::int64_t>(kPanelLanes);
  const std::int64_t nq = args.q.shape[2], nk = args.key_lengths != nullptr ? args.key_lengths[b] : args.k.shape[2],
                     first = std::max<std::int64_t>(0, std::min(nq * 7 / 8, nq - kLanes)),
                     count = std::min(kLanes, nq - first), key_head = head * args.k.shape[1] / args.q.shape[1];
  const KeyRange seen = visible_keys(make_visibility(args.options, nq, nk), first, first);
  const std::int64_t tiles = seen.end / kClassTile;  // those that the first of the queries sees whole
  if (tiles == 0) return 0;
  const float scale = make_forward_plan(args, 1).scale;
  float* q = scratch.columns;
  std::fill_n(q, dim * kPanelLanes, 0.0F);
  const FloatRows queries =
      float_rows(rows_of(args.q, b, head, first), static_cast<std::size_t>(count), dim, scratch.rows);
  transpose(queries.data, queries.ld, static_cast<std::size_t>(count), dim, scale, q, kPanelLanes);
  const FloatVector lowest = hn::Set(d, kNegativeInfinity), margin = hn::Set(d, below);
  Pair best = {lowest, lowest};
  std::size_t looked_at = 0;
  for (std::int64_t tile = 0; tile < tiles; tile = next_tile(tile, tiles)) {
    const FloatRows keys = float_rows(rows_of(args.k, b, key_head, tile * kClassTile),
                                      static_cast<std::size_t>(kClassTile), dim, scratch.rows);
    Pair top = {lowest, lowest};
    KeepTop keep{&top};
    panel_gemm<ALayout::kRowMajor>(static_cast<std::size_t>(kClassTile), keys.data, keys.ld, q, kPanelLanes, dim, keep);
    store_pair(top, scratch.tops + looked_at++ * kPanelLanes);
    best = {hn::Max(best.low, top.low), hn::Max(best.high, top.high)};
  }
  const Pair limit = {hn::Add(best.low, margin), hn::Add(best.high, margin)};
  std::size_t droppable = 0;
  for (std::size_t at = 0; at < looked_at; ++at)
    droppable += static_cast<std::size_t>(all_below(load_pair(scratch.tops + at * kPanelLanes), limit));
  return static_cast<double>(droppable) / static_cast<double>(looked_at);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(droppable_for_target);

double droppable_share(const adaattn_forward_args& args, std::int64_t b, std::int64_t head, float below,
                       const KeyHeadScratch& scratch) {
  return HWY_DYNAMIC_DISPATCH(droppable_for_target)(args, b, head, below, scratch);
}

}  // namespace adaattn::cpu
#endif
