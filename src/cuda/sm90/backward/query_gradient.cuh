// The way of dQ from registers through shared memory to FP32 sums in global memory, which rows.cuh rounds.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/consumer.cuh"
#include "cuda/sm90/backward/order.cuh"
#include "cuda/sm90/backward/schedule.cuh"

namespace adaattn::cuda::sm90 {

// A consumer's part of a tile, also in global memory: [register / 4][thread][register % 4].
template <typename Config>
__device__ __forceinline__ void stage_dq(BackwardShared<Config>& shared, const float (&dq)[Config::kSharedQueries / 2],
                                         int consumer, int step) {
  ptx::wait(shared.dq_empty[consumer], step % 2 ^ 1);
  const int thread = ptx::thread_in_warpgroup();
  float4* to = reinterpret_cast<float4*>(shared.dq[consumer]) + thread;
#pragma unroll
  for (int i = 0; i < Config::kSharedQueries / 8; ++i)
    to[128 * i] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  ptx::fence_async_proxy();
  ptx::arrive(shared.dq_full[consumer]);
}

// One thread adds what one consumer stages. Consumers never wait for a block's turn in a deterministic order, only for
// the place of the tile before.
template <typename Config>
__device__ __forceinline__ void add_dq(const BackwardParams& params, BackwardShared<Config>& shared, int consumer) {
  constexpr int kElements = 64 * Config::kSharedQueries;
  const KeyPlan& plan = shared.plan;
  QueryWalk walk(params, plan);
  const int steps = plan.tiles * params.group;
  for (int step = 0; step < steps; ++step, walk.advance(plan)) {
    const int part = 2 * tile_index(params, plan, walk) + consumer;
    if constexpr (Config::kOrdered) await_turn(params, part, turn_of<Config>(params, plan, walk.tile));
    ptx::wait(shared.dq_full[consumer], step % 2);
    float* const to = params.sums + std::int64_t{part} * kElements;
    if (params.adds)
      ptx::add_to_global(to, shared.dq[consumer], kElements * sizeof(float));
    else
      ptx::copy_to_global(to, shared.dq[consumer], kElements * sizeof(float));
    ptx::wait_sources_read();
    ptx::arrive(shared.dq_empty[consumer]);
    if constexpr (Config::kOrdered) pass_turn(params, part);
  }
  ptx::wait_sources_read();  // shared memory is given back when the block ends
}

}  // namespace adaattn::cuda::sm90
