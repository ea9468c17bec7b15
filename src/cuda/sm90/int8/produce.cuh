// What the producer of the 8-bit forward kernel does: takes tiles of work, and copies their keys and values. Queries
// the consumers read themselves.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/sm90/int8/config.h"

namespace adaattn::cuda::sm90 {

template <typename Config>
__device__ __forceinline__ void produce_int8(const Int8Params& params, Int8Shared<Config>& shared) {
  constexpr std::uint32_t kKeyBytes = sizeof(shared.k[0]), kValueBytes = Config::kKeys * Config::kDim * 2;
  ptx::RingPlace<Config::kStages> k_place, v_place;
  ptx::RingPlace<1> plan_place;
  const int key_heads = params.grid.heads / params.grid.group, tiles = params.padded_keys / Config::kKeys;

  const auto load_k = [&](const TilePlan& plan, int step) {
    const int head = plan.batch * key_heads + plan.key_head, tile = block_of_step(plan, step);
    ptx::Barrier& full = shared.k_full[k_place.stage];
    ptx::wait(shared.k_empty[k_place.stage], k_place.parity ^ 1);
    ptx::arrive_and_expect(full, kKeyBytes + sizeof(KeyTile));
    ptx::load_box(shared.k[k_place.stage], params.k, full, 0, head * params.padded_keys + tile * Config::kKeys);
    ptx::load_bytes(&shared.tile[k_place.stage], params.tiles + static_cast<std::int64_t>(head) * tiles + tile,
                    sizeof(KeyTile), full);
    k_place.advance();
  };
  const auto load_v = [&](const TilePlan& plan, int step) {
    ptx::wait(shared.v_empty[v_place.stage], v_place.parity ^ 1);
    ptx::arrive_and_expect(shared.v_full[v_place.stage], kValueBytes);
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      ptx::load_box(shared.v[v_place.stage][chunk], params.v, shared.v_full[v_place.stage], 64 * chunk,
                    block_of_step(plan, step) * Config::kKeys, plan.key_head, plan.batch);
    v_place.advance();
  };
  // Returns whether the tile that was in this place before, the last but one, has to be done again: consumers that took
  // the last one have finished it.
  const auto publish = [&](const TilePlan& plan) {
    bool failed = false;
    for (int part = 0; part < Config::kConsumers; ++part) {
      ptx::wait(shared.plan_empty[part], plan_place.parity ^ 1);
      failed |= shared.failed[plan_place.parity][part] != 0;
      shared.failed[plan_place.parity][part] = 0;
      shared.plan[plan_place.parity][part] = plan;
      ptx::arrive(shared.plan_full[part]);
    }
    plan_place.advance();
    return failed;
  };

  const int items = item_count(params.grid);
  constexpr int kNone = -1;
  int last = kNone, before = kNone;  // items that may have to be done again: the last one, and the one before it
  int again = kNone;                 // has to be
  for (int item = blockIdx.x;;) {
    TilePlan plan{.kind = TilePlan::kEnd};
    int next_item = item, trusted = kNone;
    if (again != kNone) {
      plan = plan_item<Config>(params.grid, again);
      plan.kind = TilePlan::kCareful;
    } else if (item < items) {
      // Asked for early: the answer takes a while.
      next_item = item + static_cast<int>(gridDim.x);
      if (params.next_item != nullptr) next_item = static_cast<int>(gridDim.x + atomicAdd(params.next_item, 1u));
      plan = plan_item<Config>(params.grid, item);
      plan.kind = TilePlan::kSteady;
      trusted = item;
    } else if (last != kNone || before != kNone) {
      plan.kind = TilePlan::kIdle;
    }
    const int steps = plan.kind >= TilePlan::kIdle ? 0 : plan.steps;
    again = publish(plan) ? before : kNone;
    before = last, last = trusted;
    if (plan.kind == TilePlan::kEnd) return;
    if (plan.kind == TilePlan::kCareful)  // all keys come twice: their largest scores are found first
      for (int step = 0; step < steps; ++step) load_k(plan, step);
    if (steps > 0) load_k(plan, 0);
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) load_k(plan, step + 1);
      load_v(plan, step);
    }
    item = next_item;
  }
}

}  // namespace adaattn::cuda::sm90
