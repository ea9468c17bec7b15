// Which keys a block of threads takes, and which queries it visits for them.
#pragma once

#include "cuda/sm90/backward/config.h"

namespace adaattn::cuda::sm90 {

__device__ __forceinline__ Visibility visibility_of(const BackwardParams& params, int key_count) {
  Visibility visibility = params.visibility;
  visibility.key_count = key_count;
  if (params.bottom_right) visibility.diagonal = key_count - params.query_count;
  return visibility;
}

// The queries [begin, end) that see a key, among query_count.
struct QueryRange {
  int begin, end;
};

__device__ __forceinline__ QueryRange seeing_queries(const Visibility& v, int key, int query_count) {
  if (key >= v.key_count) return {query_count, query_count};
  const std::int64_t begin = clamp_index(key - v.diagonal - v.right, 0, query_count);
  const std::int64_t last = key < v.sinks ? query_count - 1 : key - v.diagonal + v.left;
  return {static_cast<int>(begin), static_cast<int>(clamp_index(last + 1, begin, query_count))};
}

// Tiles of queries that the keys [first_key, first_key + kKeys) are visited with, as [begin, end).
template <typename Config>
__device__ __forceinline__ QueryRange visited_tiles(const Visibility& v, int first_key, int query_count) {
  if (first_key >= v.key_count) return {0, 0};
  const int last_key = min(first_key + Config::kKeys, static_cast<int>(v.key_count)) - 1;
  const int begin = seeing_queries(v, first_key, query_count).begin;
  const int end = max(seeing_queries(v, first_key, query_count).end, seeing_queries(v, last_key, query_count).end);
  if (begin >= end) return {0, 0};
  return {begin / Config::kQueries, (end + Config::kQueries - 1) / Config::kQueries};
}

// First keys first: under a causal mask they are seen by most queries. In a deterministic order last keys come first,
// so that those who add first to a tile of dQ also start first; under a causal mask each starts where no one has to add
// before it.
template <typename Config>
__device__ __forceinline__ KeyPlan plan_keys(const BackwardParams& params, int block) {
  const int heads = params.batch * (params.heads / params.group), tiles = params.key_tiles;
  const int first_head = block / (params.heads_at_once * tiles) * params.heads_at_once;
  const int side_by_side = min(params.heads_at_once, heads - first_head);
  const int rest = block - first_head * tiles;
  const int head = first_head + rest % side_by_side;
  int tile = rest / side_by_side;
  if (Config::kOrdered) tile = tiles - 1 - tile;

  KeyPlan plan;
  plan.first_key = tile * Config::kKeys;
  plan.batch = head / (params.heads / params.group);
  plan.key_head = head % (params.heads / params.group);
  plan.key_count = params.key_count;
  if (params.key_lengths != nullptr)
    plan.key_count = static_cast<int>(clamp_index(params.key_lengths[plan.batch], 0, params.key_count));

  const Visibility visibility = visibility_of(params, plan.key_count);
  const QueryRange visited = visited_tiles<Config>(visibility, plan.first_key, params.query_count);
  plan.first_tile = visited.begin;
  plan.tiles = visited.end - visited.begin;
  const int last_key = plan.first_key + Config::kKeys - 1;
  const QueryRange of_last = seeing_queries(visibility, last_key, params.query_count);
  plan.full_begin = of_last.begin;
  // Queries past the end count as seeing everything: their probabilities are 0 anyway.
  const auto past_end = [&](int end) { return end == params.query_count ? 1 << 30 : end; };
  // Where the window ends: the first key that is no sink leaves it first.
  const int first_in_window = max(plan.first_key, static_cast<int>(min(visibility.sinks, std::int64_t{1} << 30)));
  plan.full_end = last_key >= plan.key_count ? 0
                  : first_in_window > last_key
                      ? 1 << 30
                      : past_end(seeing_queries(visibility, first_in_window, params.query_count).end);
  return plan;
}

// How many blocks add to a tile of dQ before the one with these keys, in the order last keys first: those after it that
// the tile's queries see in their window or as sinks.
template <typename Config>
__device__ __forceinline__ int turn_of(const BackwardParams& params, const KeyPlan& plan, int query_tile) {
  const auto blocks_until = [](std::int64_t key) {
    return static_cast<int>((key + Config::kKeys - 1) / Config::kKeys);
  };
  const int first_query = query_tile * Config::kQueries;
  const int last_query = min(first_query + Config::kQueries, params.query_count) - 1;
  const KeyRange seen = visible_keys(visibility_of(params, plan.key_count), first_query, last_query);
  const int next = plan.first_key / Config::kKeys + 1, sink_end = blocks_until(seen.sink_end);
  const int begin = max(static_cast<int>(seen.begin) / Config::kKeys, sink_end);
  const int end = seen.begin < seen.end ? blocks_until(seen.end) : 0;
  return max(0, end - max(begin, next)) + max(0, sink_end - next);
}

// The query tiles of a plan one after the other, head by head.
struct QueryWalk {
  int head, tile;

  __device__ __forceinline__ QueryWalk(const BackwardParams& params, const KeyPlan& plan)
      : head(plan.key_head * params.group), tile(plan.first_tile) {}
  __device__ __forceinline__ void advance(const KeyPlan& plan) {
    if (++tile == plan.first_tile + plan.tiles) {
      tile = plan.first_tile;
      ++head;
    }
  }
};

__device__ __forceinline__ int tile_index(const BackwardParams& params, const KeyPlan& plan, const QueryWalk& walk) {
  return (plan.batch * params.heads + walk.head) * params.query_tiles + walk.tile;
}

}  // namespace adaattn::cuda::sm90
