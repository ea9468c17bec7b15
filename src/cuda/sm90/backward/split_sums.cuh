// The warpgroup of the split backward kernel that makes dQ, one step behind the consumers, and copies.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/consumer.cuh"
#include "cuda/sm90/backward/query_gradient.cuh"
#include "cuda/sm90/backward/schedule.cuh"

namespace adaattn::cuda::sm90 {

// Named barriers: buffer i of dS is full (kDsBarrier + i), and this warpgroup alone.
constexpr int kDsBarrier = 2, kSumsBarrier = 4;

// Copies keys, values and queries: for one thread.
template <typename Config>
struct SplitLoader {
  const BackwardParams& params;
  SplitShared<Config>& shared;
  QueryWalk walk;

  __device__ __forceinline__ SplitLoader(const BackwardParams& params_, SplitShared<Config>& shared_)
      : params(params_), shared(shared_), walk(params_, shared_.plan) {}

  template <typename Buffer>
  __device__ __forceinline__ void load_keys(Buffer& buffer, const CUtensorMap& map, ptx::Barrier& full) {
    ptx::arrive_and_expect(full, sizeof(buffer));
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      ptx::load_box(buffer[chunk], map, full, 64 * chunk, shared.plan.first_key, shared.plan.key_head,
                    shared.plan.batch);
  }
  template <typename Buffer>
  __device__ __forceinline__ void load_tile(Buffer& buffer, const CUtensorMap& map, ptx::Barrier& full) {
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      ptx::load_box(buffer[chunk], map, full, 64 * chunk, walk.tile * Config::kQueries, walk.head, shared.plan.batch);
  }
  __device__ __forceinline__ void load_q(int stage) {
    constexpr std::uint32_t kRowBytes = sizeof(shared.rows[0]);
    ptx::arrive_and_expect(shared.q_full[stage], sizeof(shared.q[0]) + kRowBytes);
    load_tile(shared.q[stage], params.q, shared.q_full[stage]);
    ptx::load_bytes(shared.rows[stage],
                    params.rows + std::int64_t{tile_index(params, shared.plan, walk)} * 2 * Config::kQueries, kRowBytes,
                    shared.q_full[stage]);
  }
  __device__ __forceinline__ void load_dout(int stage) {
    ptx::arrive_and_expect(shared.dout_full[stage], sizeof(shared.dout[0]));
    load_tile(shared.dout[stage], params.dout_blocks, shared.dout_full[stage]);
    walk.advance(shared.plan);
  }
};

template <typename T, typename Config>
__device__ __forceinline__ void sum_dq(const BackwardParams& params, SplitShared<Config>& shared) {
  using Operands = BackwardOperands<Config>;
  using RowMajor = typename Operands::RowMajor;
  const KeyPlan& plan = shared.plan;
  const int steps = plan.tiles * params.group;
  SplitLoader<Config> loader(params, shared);
  if (threadIdx.x == 0 && steps > 0) {
    loader.load_keys(shared.k, params.k, shared.k_full);
    for (int stage = 0; stage < min(Config::kStages, steps); ++stage) {
      loader.load_q(stage);
      if (stage == 0) loader.load_keys(shared.v, params.v, shared.v_full);
      loader.load_dout(stage);
    }
  }
  __syncwarp();
  if (steps > 0) ptx::wait(shared.k_full, 0);

  QueryWalk walk(params, plan);
  ptx::RingPlace<Config::kStages> place;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int buffer = step % 2;
    ptx::barrier_sync(kDsBarrier + buffer, Config::kThreads);
    float dq[Config::kQueries / 2];
    Operands::template start_dq<T>(dq, RowMajor(Operands::address(shared.k)),
                                   RowMajor(Operands::address(shared.ds[buffer])));
    ptx::wgmma_wait<0>();
    ptx::pin_registers(dq);
    const int thread = ptx::thread_in_warpgroup();
    if (thread % 32 == 0) ptx::arrive(shared.ds_empty[buffer]);
    if (thread == 0) ptx::wait_sources_read();  // of the step before
    ptx::barrier_sync(kSumsBarrier, ptx::kWarpgroupThreads);
    float4* to = reinterpret_cast<float4*>(shared.dq) + thread;
#pragma unroll
    for (int i = 0; i < Config::kQueries / 8; ++i)
      to[128 * i] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    ptx::fence_async_proxy();
    ptx::barrier_sync(kSumsBarrier, ptx::kWarpgroupThreads);
    if (thread == 0) {
      constexpr int kElements = Config::kQueries * Config::kDim;
      ptx::add_to_global(params.sums + std::int64_t{tile_index(params, plan, walk)} * kElements, shared.dq,
                         kElements * sizeof(float));
      if (step + Config::kStages < steps) {
        ptx::wait(shared.empty[place.stage], place.parity);
        loader.load_q(place.stage);
        loader.load_dout(place.stage);
      }
    }
    __syncwarp();
    place.advance();
    walk.advance(plan);
  }
  if (threadIdx.x == 0) ptx::wait_sources_read();  // shared memory is given back when the block ends
}

}  // namespace adaattn::cuda::sm90
