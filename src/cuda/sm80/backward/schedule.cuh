// Which keys a block of threads takes, and which queries it visits for them.
#pragma once

#include "cuda/sm80/backward/config.h"
#include "cuda/sm80/reach.cuh"

namespace adaattn::cuda::sm80 {

// First keys first: under a causal mask they are seen by most queries. In a deterministic order last keys come first,
// so that those who add first to a tile of dQ also start first.
template <typename Config>
__device__ __forceinline__ KeyPlan plan_keys(const BackwardParams& params, int block) {
  constexpr int kKeys = Config::kKeys, kQueries = Config::kQueries;
  const int heads = params.batch * (params.heads / params.group), tiles = params.key_tiles;
  const int first_head = block / (params.heads_at_once * tiles) * params.heads_at_once;
  const int side_by_side = min(params.heads_at_once, heads - first_head);
  const int rest = block - first_head * tiles;
  const int head = first_head + rest % side_by_side;
  const int tile = params.order != nullptr ? tiles - 1 - rest / side_by_side : rest / side_by_side;

  KeyPlan plan;
  plan.first_key = tile * kKeys;
  plan.batch = head / (params.heads / params.group);
  plan.key_head = head % (params.heads / params.group);
  plan.reach = reach_of(params.visibility, params.bottom_right, params.key_lengths, plan.batch, params.query_count,
                        params.key_count);
  const Reach& reach = plan.reach;

  const int last_key = plan.first_key + kKeys - 1, last_that_exists = min(last_key, reach.key_count - 1);
  const Queries of_first = queries_of(reach, plan.first_key), of_last = queries_of(reach, last_that_exists);
  const int end = max(of_first.end, of_last.end);
  const bool any = plan.first_key < reach.key_count && of_first.begin < end;
  plan.first_tile = any ? of_first.begin / kQueries : 0;
  plan.tiles = any ? (end + kQueries - 1) / kQueries - plan.first_tile : 0;

  // The last key is the last to come into sight, the first that is no sink the first to leave the window.
  const int first_in_window = max(plan.first_key, reach.sinks);
  plan.full_begin = of_last.begin;
  plan.full_end = last_key >= reach.key_count  ? 0
                  : first_in_window > last_key ? params.query_count
                                               : queries_of(reach, first_in_window).end;
  return plan;
}

// How many blocks add to a tile of dQ before the one with these keys, in the order last keys first: those after it that
// the tile's queries see in their window or as sinks.
template <typename Config>
__device__ __forceinline__ unsigned turn_of(const KeyPlan& plan, int query_tile) {
  const auto blocks_until = [](int key) { return (key + Config::kKeys - 1) / Config::kKeys; };
  const int first_query = query_tile * Config::kQueries;
  const int last_query = min(first_query + Config::kQueries, plan.reach.query_count) - 1;
  const Keys seen = keys_of(plan.reach, first_query, last_query);
  const int next = plan.first_key / Config::kKeys + 1, sink_end = blocks_until(seen.sink_end);
  const int begin = max(seen.begin / Config::kKeys, sink_end), end = seen.begin < seen.end ? blocks_until(seen.end) : 0;
  return static_cast<unsigned>(max(0, end - max(begin, next)) + max(0, sink_end - next));
}

__device__ __forceinline__ QueryPlace first_place(const BackwardParams& params, const KeyPlan& plan) {
  return {plan.key_head * params.group, plan.first_tile};
}

__device__ __forceinline__ QueryPlace next_place(const KeyPlan& plan, QueryPlace place) {
  const bool last = place.tile + 1 == plan.first_tile + plan.tiles;
  return {place.head + (last ? 1 : 0), last ? plan.first_tile : place.tile + 1};
}

// The tile's index among those of all heads.
__device__ __forceinline__ std::int64_t index_of(const BackwardParams& params, const KeyPlan& plan, QueryPlace place) {
  return (static_cast<std::int64_t>(plan.batch) * params.heads + place.head) * params.query_tiles + place.tile;
}

}  // namespace adaattn::cuda::sm80
