// Which tile a block of threads takes, and which blocks of keys that tile visits.
#pragma once

#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

__device__ __forceinline__ Visibility visibility_of(const ForwardParams& params, int key_count) {
  Visibility visibility = params.visibility;
  visibility.key_count = key_count;
  if (params.bottom_right) visibility.diagonal = key_count - params.query_count;
  return visibility;
}

// Last tiles of a head first: under a causal mask they are the longest. Heads side by side share the L2 cache, so
// their number is bounded by what their keys and values take there.
template <typename Config>
__device__ __forceinline__ TilePlan plan_tile(const ForwardParams& params, int tile) {
  const int heads = params.batch * params.heads, tiles = params.tiles_per_head;
  const int first_head = tile / (params.heads_at_once * tiles) * params.heads_at_once;
  const int side_by_side = min(params.heads_at_once, heads - first_head);
  const int rest = tile - first_head * tiles;
  const int head = first_head + rest % side_by_side;

  TilePlan plan;
  plan.first_query = (tiles - 1 - rest / side_by_side) * Config::kQueries;
  plan.batch = head / params.heads;
  plan.head = head % params.heads;
  plan.key_count = params.key_count;
  if (params.key_lengths != nullptr)
    plan.key_count = static_cast<int>(clamp_index(params.key_lengths[plan.batch], 0, params.key_count));

  const Visibility visibility = visibility_of(params, plan.key_count);
  const int first = plan.first_query, last = min(first + Config::kQueries, params.query_count) - 1;
  const KeyRange any = visible_keys(visibility, first, last);
  constexpr int kKeys = Config::kKeys;
  plan.block_end = static_cast<int>((any.end + kKeys - 1) / kKeys);
  const int block_begin = any.begin < any.end ? static_cast<int>(any.begin / kKeys) : plan.block_end;
  plan.window_steps = plan.block_end - block_begin;
  plan.sink_blocks = min(static_cast<int>((any.sink_end + kKeys - 1) / kKeys), block_begin);
  plan.steps = plan.window_steps + plan.sink_blocks;
  return plan;
}

__device__ __forceinline__ int block_of_step(const TilePlan& plan, int step) {
  return step < plan.window_steps ? plan.block_end - 1 - step : plan.sink_blocks - 1 - (step - plan.window_steps);
}

// What one consumer's 64 rows do in their tile.
struct StripPlan {
  int first_step;            // steps before it hold no key that these rows see
  int full_begin, full_end;  // blocks in [full_begin, full_end) are seen whole by every row
};

template <typename Config>
__device__ __forceinline__ StripPlan plan_strip(const ForwardParams& params, const TilePlan& plan, int consumer) {
  constexpr int kKeys = Config::kKeys;
  const int first = plan.first_query + 64 * consumer, last = min(first + 64, params.query_count) - 1;
  if (first > last) return {.first_step = plan.steps};
  const Visibility visibility = visibility_of(params, plan.key_count);
  const KeyRange of_first = visible_keys(visibility, first, first), of_last = visible_keys(visibility, last, last);
  const int block_end = static_cast<int>((of_last.end + kKeys - 1) / kKeys);
  return {.first_step = min(plan.block_end - block_end, plan.window_steps),
          .full_begin = static_cast<int>((of_last.begin + kKeys - 1) / kKeys),
          .full_end = static_cast<int>(of_first.end / kKeys)};
}

}  // namespace adaattn::cuda::sm90
