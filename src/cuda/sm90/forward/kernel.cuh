// Exact attention, forward, for sm_90a: a persistent, warp-specialised kernel.
//
// One thread of the producer warpgroup copies queries, keys and values into shared memory (TMA). Each consumer
// warpgroup keeps 64 query rows: while its softmax works on one block of scores, the tensor cores compute the product
// of the block before with V and, in turn, the other consumers' products. The schedule is FlashAttention-3's (arXiv
// 2407.08608): next Q K^T before the current P V, consumers taking turns at the tensor cores.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_rs.cuh"
#include "cuda/common/ptx/wgmma_ss.cuh"
#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/epilogue.cuh"
#include "cuda/sm90/forward/mask.cuh"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/forward/tile_plan.h"

namespace adaattn::cuda::sm90 {

template <typename Config>
__device__ __forceinline__ void produce(const ForwardParams& params, ForwardShared<Config>& shared) {
  constexpr std::uint32_t kBlockBytes = sizeof(shared.k[0]);
  ptx::RingPlace<Config::kStages> k_place, v_place;
  ptx::RingPlace<1> q_place;

  const auto load_block = [&](auto& buffers, ptx::Barrier* full, ptx::Barrier* empty,
                              ptx::RingPlace<Config::kStages>& place, const CUtensorMap& map, const TilePlan& plan,
                              int step) {
    ptx::wait(empty[place.stage], place.parity ^ 1);
    ptx::arrive_and_expect(full[place.stage], kBlockBytes);
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      ptx::load_box(buffers[place.stage][chunk], map, full[place.stage], 64 * chunk,
                    block_of_step(plan, step) * Config::kKeys, plan.key_head, plan.batch);
    place.advance();
  };
  const auto load_k = [&](const TilePlan& plan, int step) {
    load_block(shared.k, shared.k_full, shared.k_empty, k_place, params.k, plan, step);
  };
  const auto load_v = [&](const TilePlan& plan, int step) {
    load_block(shared.v, shared.v_full, shared.v_empty, v_place, params.v, plan, step);
  };

  // What a row box holds is copied, and counted, also where it reaches past the tensor. Rows of the tile after it keep
  // what they had: nothing reads their results. Without a tile, tells the consumers that there is no more work.
  const auto load_queries = [&](const TilePlan& plan) {
    constexpr int kParts = Config::kQueryParts, kRows = Config::kQueries / kParts;
    for (int part = 0; part < kParts; ++part) {
      ptx::wait(shared.q_empty[part], q_place.parity ^ 1);
      shared.plan[q_place.parity][part] = plan;
      if (plan.first_query < 0) {
        ptx::arrive(shared.q_full[part]);
        continue;
      }
      const int rows = Config::kPacks ? params.grid.pack_heads * params.grid.pack_tokens : kRows;
      ptx::arrive_and_expect(shared.q_full[part], static_cast<std::uint32_t>(rows * Config::kChunks * 128));
      for (int chunk = 0; chunk < Config::kChunks; ++chunk)
        if constexpr (Config::kPacks)
          ptx::load_box(shared.q[chunk], params.q, shared.q_full[part], 64 * chunk,
                        plan.head - plan.key_head * params.grid.group, plan.first_query, plan.key_head, plan.batch);
        else
          ptx::load_box(shared.q[chunk][part * kRows], params.q, shared.q_full[part], 64 * chunk,
                        plan.first_query + part * kRows, plan.head, plan.batch);
    }
    q_place.advance();
  };

  const int items = item_count(params.grid);
  for (int item = blockIdx.x;;) {
    TilePlan plan{.first_query = -1};
    int next_item = item + static_cast<int>(gridDim.x);
    if (item < items) {
      // Asked for early: the answer takes a while, and is not needed before this tile's last load.
      if (params.next_item != nullptr) next_item = static_cast<int>(gridDim.x + atomicAdd(params.next_item, 1u));
      plan = plan_item<Config>(params.grid, item);
    }
    if (plan.first_query >= 0 && plan.steps > 0) load_k(plan, 0);  // ahead of Q, whose buffer is still in use
    load_queries(plan);
    if (plan.first_query < 0) return;
    for (int step = 0; step < plan.steps; ++step) {
      if (step + 1 < plan.steps) load_k(plan, step + 1);
      load_v(plan, step);
    }
    item = next_item;
  }
}

template <typename Config>
using RowMajor = ptx::WgmmaOperand<0>;  // q and k: the product's k runs along their rows
template <typename Config>
using ColumnMajor = ptx::WgmmaOperand<Config::kKeys * 128>;  // v

// scores = q k^T, one group of products.
template <typename T, typename Config>
__device__ __forceinline__ void start_scores(float (&scores)[Config::kKeys / 2], RowMajor<Config> q,
                                             RowMajor<Config> k) {
  ptx::pin_registers(scores);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kDim / 16; ++i) {
    const int chunk = i / 4, within = i % 4 * 32;
    ptx::wgmma_ss<T>(scores, q.at(chunk * Config::kQueries * 128 + within), k.at(chunk * Config::kKeys * 128 + within),
                     i > 0);
  }
  ptx::wgmma_commit();
}

// out += p v, one group of products. Calls pass_turn with kEarlyTurn of them still to be started.
template <typename T, typename Config, typename PassTurn>
__device__ __forceinline__ void start_output(float (&out)[Config::kDim / 2], std::uint32_t (&p)[Config::kKeys / 4],
                                             ColumnMajor<Config> v, const PassTurn& pass_turn) {
  constexpr int kProducts = Config::kKeys / 16;
  ptx::pin_registers(out);
  ptx::pin_registers(p);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    if (Config::kEarlyTurn > 0 && i == kProducts - Config::kEarlyTurn) pass_turn();
    ptx::wgmma_rs<T>(out, p + 4 * i, v.at(i * 16 * 128), 1);
  }
  ptx::wgmma_commit();
  if (Config::kEarlyTurn == 0) pass_turn();
}

// Values at and after the key length may be anything, and 0 * NaN is NaN: write zeros over them. Only the first block a
// tile visits can hold such keys.
template <typename Config>
__device__ __forceinline__ void clear_tail(ForwardShared<Config>& shared, int stage, int first) {
  for (int i = first * 8 + static_cast<int>(threadIdx.x) - 128; i < Config::kKeys * 8; i += 128 * Config::kConsumers)
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      reinterpret_cast<uint4*>(shared.v[stage][chunk])[i] = make_uint4(0, 0, 0, 0);
  ptx::fence_async_proxy();
  ptx::barrier_sync(1 + Config::kConsumers, 128 * Config::kConsumers);
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const ForwardParams& params, ForwardShared<Config>& shared, int consumer) {
  constexpr int kKeys = Config::kKeys, kTurnThreads = 2 * ptx::kWarpgroupThreads;
  const int query_part = Config::kQueryParts > 1 ? consumer : 0;
  const int turn = 1 + consumer, next_turn = 1 + (consumer + 1) % Config::kConsumers;
  const auto address = [](const auto& object) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(&object)); };
  const auto release = [&](ptx::Barrier& barrier) {
    if (ptx::thread_in_warpgroup() % 32 == 0) ptx::arrive(barrier);
  };
  const RowMajor<Config> q(address(shared.q[0][64 * consumer]));
  ptx::RingPlace<Config::kStages> k_place, v_place;
  ptx::RingPlace<1> q_place;

  if (Config::kTakeTurns && consumer == Config::kConsumers - 1) ptx::barrier_arrive(next_turn, kTurnThreads);
  for (;;) {
    ptx::wait(shared.q_full[query_part], q_place.parity);
    const TilePlan& plan = shared.plan[q_place.parity][query_part];  // registers are scarce
    q_place.advance();
    if (plan.first_query < 0) return;
    const StripPlan strip = plan_strip<Config>(params.grid, plan, consumer);
    const auto tile_row = [&] {
      const int thread = ptx::thread_in_warpgroup();
      return 64 * consumer + 16 * (thread / 32) + thread % 32 / 4;
    };
    const auto finish_scores = [&](float(&scores)[kKeys / 2], int step) {
      const int block = block_of_step(plan, step);
      const int first_key = block * kKeys + 2 * (ptx::thread_in_warpgroup() % 4);
      const Visibility visibility = visibility_of(params.grid, plan.key_count);
      if constexpr (Config::kMasks) {
        const RowPlace rows[2] = {place_of_row<Config>(params.grid, plan, tile_row()),
                                  place_of_row<Config>(params.grid, plan, tile_row() + 8)};
        scale_and_mask<T>(scores, params, plan.batch, rows, visibility, first_key);
      }
      if (block >= strip.full_begin && block < strip.full_end) return;
      const int queries[2] = {query_of_row<Config>(params.grid, plan.first_query, tile_row()),
                              query_of_row<Config>(params.grid, plan.first_query, tile_row() + 8)};
      hide(scores, visibility, queries, first_key);
    };
    const float scale_log2 = Config::kMasks ? 1.0f : params.scale_log2;
    const auto give_queries_back = [&] { ptx::arrive(shared.q_empty[query_part]); };  // every thread of the consumer
    float out[Config::kDim / 2];
#pragma unroll
    for (float& value : out) value = 0.0f;
    RowState state;

    if (plan.key_count < params.grid.key_count && plan.steps > 0)
      if (const int tail = plan.key_count - block_of_step(plan, 0) * kKeys; tail < kKeys) {
        ptx::wait(shared.v_full[v_place.stage], v_place.parity);
        clear_tail(shared, v_place.stage, tail);
      }

    // Blocks that only other consumers need: hand them and the turn on.
    for (int step = 0; step < strip.first_step; ++step) {
      ptx::wait(shared.k_full[k_place.stage], k_place.parity);
      release(shared.k_empty[k_place.stage]);
      k_place.advance();
      ptx::wait(shared.v_full[v_place.stage], v_place.parity);
      release(shared.v_empty[v_place.stage]);
      v_place.advance();
      if (Config::kTakeTurns && step + 1 < plan.steps) {
        ptx::barrier_sync(turn, kTurnThreads);
        ptx::barrier_arrive(next_turn, kTurnThreads);
      }
    }

    if (strip.first_step < plan.steps) {
      float scores[kKeys / 2], correction[2];
      std::uint32_t p[kKeys / 4];
      ptx::wait(shared.k_full[k_place.stage], k_place.parity);
      start_scores<T, Config>(scores, q, RowMajor<Config>(address(shared.k[k_place.stage])));
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      release(shared.k_empty[k_place.stage]);
      k_place.advance();
      finish_scores(scores, strip.first_step);
      const float first_tops[2] = {row_max(scores, 0), row_max(scores, 1)};
      exponentiate<Config::kMasks>(scores, first_tops, state, correction, scale_log2);
      pack_operand<T>(p, scores);

      const auto wait_for_next_keys = [&](int step) {
        if (step + 1 < plan.steps)
          ptx::wait(shared.k_full[k_place.stage], k_place.parity);
        else if constexpr (Config::kOwnQueries)
          give_queries_back();
      };
      wait_for_next_keys(strip.first_step);
#pragma unroll 1
      for (int step = strip.first_step + 1; step < plan.steps; ++step) {
        const RowMajor<Config> k(address(shared.k[k_place.stage]));
        const ColumnMajor<Config> v(address(shared.v[v_place.stage]));
        if constexpr (Config::kTakeTurns) ptx::barrier_sync(turn, kTurnThreads);
        start_scores<T, Config>(scores, q, k);
        ptx::wait(shared.v_full[v_place.stage], v_place.parity);
        start_output<T, Config>(out, p, v, [&] {
          if constexpr (Config::kTakeTurns) ptx::barrier_arrive(next_turn, kTurnThreads);
        });
        ptx::wgmma_wait<1>();
        ptx::pin_registers(scores);
        release(shared.k_empty[k_place.stage]);
        k_place.advance();
        finish_scores(scores, step);
        const float tops[2] = {row_max(scores, 0), row_max(scores, 1)};
        // Here and not where they are needed: the wait's loop ends a block of code, so that the assembler leaves the
        // maxima above the next wait, to overlap with P V. What follows it is bound by the exponentials, one every
        // eight cycles, and needs to be one block for everything else to find its place between them.
        wait_for_next_keys(step);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(out);
        release(shared.v_empty[v_place.stage]);
        v_place.advance();
        exponentiate<Config::kMasks>(scores, tops, state, correction, scale_log2);
        rescale(out, correction);
        pack_operand<T>(p, scores);
      }
      if constexpr (!Config::kOwnQueries) give_queries_back();
      ptx::wait(shared.v_full[v_place.stage], v_place.parity);
      start_output<T, Config>(out, p, ColumnMajor<Config>(address(shared.v[v_place.stage])), [] {});
      ptx::wgmma_wait<0>();
      ptx::pin_registers(out);
      release(shared.v_empty[v_place.stage]);
      v_place.advance();
    } else {
      give_queries_back();
    }
    if (Config::kParts && plan.part != TilePlan::kWhole)
      store_part<Config>(params, plan, tile_row(), out, state);
    else
      store_tile<T, Config>(params, plan, tile_row(), out, state);
  }
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    for (int part = 0; part < Config::kQueryParts; ++part) {
      ptx::init_barrier(shared.q_full[part], 1);
      ptx::init_barrier(shared.q_empty[part], ptx::kWarpgroupThreads * Config::kConsumers / Config::kQueryParts);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::init_barrier(shared.k_full[stage], 1);
      ptx::init_barrier(shared.v_full[stage], 1);
      ptx::init_barrier(shared.k_empty[stage], kConsumerWarps);
      ptx::init_barrier(shared.v_empty[stage], kConsumerWarps);
    }
    ptx::publish_barriers();
    ptx::prefetch_map(params.q), ptx::prefetch_map(params.k), ptx::prefetch_map(params.v);
  }
  // What combines the parts may be launched: it waits for them to be written.
  if constexpr (Config::kParts) asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
  __syncthreads();
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / ptx::kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    if constexpr (Config::kTradesRegisters) ptx::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce(params, shared);
  } else {
    if constexpr (Config::kTradesRegisters) ptx::take_registers<Config::kConsumerRegisters>();
    consume<T, Config>(params, shared, warpgroup - 1);
  }
}

}  // namespace adaattn::cuda::sm90
