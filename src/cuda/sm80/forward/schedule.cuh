// Which tile a block of threads takes, and which blocks of keys that tile and each of its warps visit.
#pragma once

#include "cuda/sm80/forward/config.h"
#include "cuda/sm80/reach.cuh"

namespace adaattn::cuda::sm80 {

template <typename Config>
__device__ __forceinline__ int block_after(int key) {
  return (key + Config::kKeys - 1) / Config::kKeys;
}

__device__ __forceinline__ int block_of_step(const TilePlan& plan, int step) {
  return step < plan.window_steps ? plan.block_end - 1 - step : plan.sink_blocks - 1 - (step - plan.window_steps);
}

// Last tiles of a head first: under a causal mask they are the longest.
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
  plan.reach = reach_of(params.visibility, params.bottom_right, params.key_lengths, plan.batch, params.query_count,
                        params.key_count);
  const auto head_of = [&](const MatrixView& view, int h) {
    return static_cast<const std::uint16_t*>(view.data) + plan.batch * view.stride[0] + h * view.stride[1];
  };
  plan.q = head_of(params.q, plan.head);
  plan.k = head_of(params.k, plan.head / params.group);
  plan.v = head_of(params.v, plan.head / params.group);
  plan.k_stride = params.k.stride[2];
  plan.v_stride = params.v.stride[2];

  const int last = min(plan.first_query + Config::kQueries, params.query_count) - 1;
  const Keys any = keys_of(plan.reach, plan.first_query, last);
  plan.block_end = block_after<Config>(any.end);
  const int block_begin = any.begin < any.end ? any.begin / Config::kKeys : plan.block_end;
  plan.window_steps = plan.block_end - block_begin;
  plan.sink_blocks = min(block_after<Config>(any.sink_end), block_begin);
  plan.steps = plan.window_steps + plan.sink_blocks;
  return plan;
}

template <typename Config>
__device__ __forceinline__ WarpPlan plan_warp(const TilePlan& plan, int warp) {
  const int first = plan.first_query + 16 * Config::kStrips * warp;
  const int last = min(first + 16 * Config::kStrips, plan.reach.query_count) - 1;
  if (first > last) return {};
  const Keys any = keys_of(plan.reach, first, last);
  return {.begin = any.begin / Config::kKeys,
          .end = block_after<Config>(any.end),
          .sink_end = block_after<Config>(any.sink_end),
          .full_begin = block_after<Config>(keys_of(plan.reach, last, last).begin),
          .full_end = keys_of(plan.reach, first, first).end / Config::kKeys};
}

}  // namespace adaattn::cuda::sm80
