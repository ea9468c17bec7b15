// What the producer of the sm_90a forward kernel does: takes tiles of work, and copies their queries, keys and values.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/tile_plan.h"

namespace adaattn::cuda::sm90 {

// Whether an instance keeps references: float16 would overflow too soon.
template <typename T, typename Config>
constexpr bool keeps_reference() {
  return Config::kKeepsReference && std::is_same_v<T, __nv_bfloat16>;
}

template <typename T, typename Config>
__device__ __forceinline__ void produce(const ForwardParams& params, ForwardShared<Config>& shared) {
  constexpr std::uint32_t kBlockBytes = sizeof(shared.k[0]);
  ptx::RingPlace<Config::kStages> k_place, v_place;
  ptx::RingPlace<1> q_place;

  const std::uint16_t* order = nullptr;  // of the tile's blocks, where they are listed
  const auto block_at = [&](const TilePlan& plan, int step) {
    if constexpr (Config::kListed) return static_cast<int>(order[step]);
    return block_of_step(plan, step);
  };
  const auto load_block = [&](auto& buffers, ptx::Barrier* full, ptx::Barrier* empty,
                              ptx::RingPlace<Config::kStages>& place, const CUtensorMap& map, const TilePlan& plan,
                              int step) {
    const int first_key = block_at(plan, step) * Config::kKeys;
    ptx::wait(empty[place.stage], place.parity ^ 1);
    ptx::arrive_and_expect(full[place.stage], kBlockBytes);
    for (int chunk = 0; chunk < Config::kStoredChunks; ++chunk)
      ptx::load_box(buffers[place.stage][chunk], map, full[place.stage], 64 * chunk, first_key, plan.key_head,
                    plan.batch);
    place.advance();
  };
  const auto load_k = [&](const TilePlan& plan, int step) {
    load_block(shared.k, shared.k_full, shared.k_empty, k_place, params.k, plan, step);
  };
  const auto load_v = [&](const TilePlan& plan, int step) {
    load_block(shared.v, shared.v_full, shared.v_empty, v_place, params.v, plan, step);
  };

  // What a row box holds is copied, and counted, also where it reaches past the tensor. Rows of the tile after it keep
  // what they had: nothing reads their results. Tells the consumers, too, that there is nothing to do. Returns whether
  // the tile that was in this place before, the last but one, has to be done again: to give the last one's queries
  // back, consumers have finished that one.
  const auto load_queries = [&](const TilePlan& plan) {
    constexpr int kParts = Config::kQueryParts, kRows = Config::kQueries / kParts;
    bool failed = false;
    for (int part = 0; part < kParts; ++part) {
      ptx::wait(shared.q_empty[part], q_place.parity ^ 1);
      if constexpr (Config::kKeepsReference) {
        unsigned& flag = shared.failed[q_place.parity][part];
        failed |= flag != 0;
        flag = 0;
      }
      shared.plan[q_place.parity][part] = plan;
      if (plan.kind >= TilePlan::kIdle) {
        ptx::arrive(shared.q_full[part]);
        continue;
      }
      const int rows = Config::kPacks ? params.grid.pack_heads * params.grid.pack_tokens : kRows;
      ptx::arrive_and_expect(shared.q_full[part], static_cast<std::uint32_t>(rows * Config::kStoredChunks * 128));
      for (int chunk = 0; chunk < Config::kStoredChunks; ++chunk)
        if constexpr (Config::kPacks)
          ptx::load_box(shared.q[chunk], params.q, shared.q_full[part], 64 * chunk,
                        plan.head - plan.key_head * params.grid.group, plan.first_query, plan.key_head, plan.batch);
        else
          ptx::load_box(shared.q[chunk][part * kRows], params.q, shared.q_full[part], 64 * chunk,
                        plan.first_query + part * kRows, plan.head, plan.batch);
    }
    q_place.advance();
    return failed;
  };

  int head_count = params.grid.batch * params.grid.heads;
  if constexpr (Config::kListed)
    if (params.lists.heads != nullptr) head_count = *params.lists.head_count;
  const int items = Config::kListed ? head_count * params.grid.tiles_per_pack : item_count(params.grid);
  const auto plan_of = [&](int item) {
    if constexpr (!Config::kListed) return plan_item<Config>(params.grid, item);
    const ForwardLists& lists = params.lists;
    TilePlan plan = place_of_listed<Config>(params.grid, head_count, lists.heads, item);
    const int tile =
        (plan.batch * params.grid.heads + plan.head) * params.grid.tiles_per_pack + plan.first_query / Config::kQueries;
    keep_steps(plan, lists.count[tile]);
    order = lists.order + static_cast<std::int64_t>(tile) * lists.blocks;
    return plan;
  };
  constexpr int kNone = -1;
  int last = kNone, before = kNone;  // items that may have to be done again: the last one, and the one before it
  int again = kNone;                 // has to be
  for (int item = blockIdx.x;;) {
    TilePlan plan{.kind = TilePlan::kEnd};
    int next_item = item, trusted = kNone;
    if (Config::kKeepsReference && again != kNone) {
      plan = plan_of(again);
      plan.kind = TilePlan::kCareful;
    } else if (item < items) {
      // Asked for early: the answer takes a while, and is not needed before this tile's last load.
      next_item = item + static_cast<int>(gridDim.x);
      if (params.next_item != nullptr) next_item = static_cast<int>(gridDim.x + atomicAdd(params.next_item, 1u));
      plan = plan_of(item);
      plan.kind = keeps_reference<T, Config>() ? TilePlan::kSteady : TilePlan::kCareful;
      if (keeps_reference<T, Config>()) trusted = item;
    } else if (last != kNone || before != kNone) {
      plan.kind = TilePlan::kIdle;
    }
    const int steps = plan.kind >= TilePlan::kIdle ? 0 : plan.steps;
    if (steps > 0) load_k(plan, 0);  // ahead of Q, whose buffer is still in use
    again = load_queries(plan) ? before : kNone;
    before = last, last = trusted;
    if (plan.kind == TilePlan::kEnd) return;
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) load_k(plan, step + 1);
      load_v(plan, step);
    }
    item = next_item;
  }
}

}  // namespace adaattn::cuda::sm90
