// Exact gradients for sm_90a: recomputes the probabilities from lse (FlashAttention-2, arXiv 2307.08691, algorithm 2).
//
// A block of threads keeps 128 keys and values and walks over the queries that see them. Per block of queries, all of
// it transposed so that P^T and dS^T leave the tensor cores as the A operands of the next products:
//   S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta), dV += P^T dO, dK += dS^T Q,
//   dQ^T += K^T dS^T
// dV and dK stay in registers. dQ^T needs the dS of both consumers, which meet in shared memory, from where the copy
// engine adds it to sums in global memory, at once or a step late (handover.cuh). The next block's S^T starts before
// this step's dQ^T, so that its exponentials have products to hide behind. The scale on dQ and dK is left to the end.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/consumer.cuh"
#include "cuda/sm90/backward/handover.cuh"
#include "cuda/sm90/backward/query_gradient.cuh"
#include "cuda/sm90/backward/schedule.cuh"

namespace adaattn::cuda::sm90 {

template <typename Config>
__device__ __forceinline__ void produce(const BackwardParams& params, BackwardShared<Config>& shared) {
  const KeyPlan& plan = shared.plan;
  constexpr std::uint32_t kQueryBytes = sizeof(shared.q[0]), kRowBytes = sizeof(shared.rows[0]);
  const int steps = plan.tiles * params.group;
  if (steps == 0) return;
  const auto load_keys = [&](auto& buffer, const CUtensorMap& map, ptx::Barrier& full) {
    ptx::arrive_and_expect(full, sizeof(buffer));
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      ptx::load_box(buffer[chunk], map, full, 64 * chunk, plan.first_key, plan.key_head, plan.batch);
  };
  load_keys(shared.k, params.k, shared.k_full);
  ptx::RingPlace<Config::kStages> place;
  QueryWalk walk(params, plan);
  for (int step = 0; step < steps; ++step) {
    const auto load_queries = [&](auto& buffer, const CUtensorMap& map, ptx::Barrier& full) {
      for (int chunk = 0; chunk < Config::kChunks; ++chunk)
        ptx::load_box(buffer[place.stage][chunk], map, full, 64 * chunk, walk.tile * Config::kQueries, walk.head,
                      plan.batch);
    };
    ptx::wait(shared.q_empty[place.stage], place.parity ^ 1);
    ptx::arrive_and_expect(shared.q_full[place.stage], kQueryBytes + kRowBytes);
    load_queries(shared.q, params.q, shared.q_full[place.stage]);
    ptx::load_bytes(shared.rows[place.stage],
                    params.rows + std::int64_t{tile_index(params, plan, walk)} * 2 * Config::kQueries, kRowBytes,
                    shared.q_full[place.stage]);
    if (step == 0) load_keys(shared.v, params.v, shared.v_full);
    ptx::wait(shared.dout_empty[place.stage], place.parity ^ 1);
    ptx::arrive_and_expect(shared.dout_full[place.stage], kQueryBytes);
    load_queries(shared.dout, params.dout_blocks, shared.dout_full[place.stage]);
    place.advance();
    walk.advance(plan);
  }
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const BackwardParams& params, BackwardShared<Config>& shared, int consumer) {
  using Operands = BackwardOperands<Config>;
  using RowMajor = typename Operands::RowMajor;
  using Columns = typename Operands::Columns;
  constexpr int kQueries = Config::kQueries;
  static_assert(Config::kStages == 2, "stage and parity are bits of the step");
  const KeyPlan& plan = shared.plan;  // stays in shared memory: registers are scarce
  const Handover<Config> handover{shared, consumer};
  float dk[Config::kDim / 2], dv[Config::kDim / 2];
#pragma unroll
  for (int i = 0; i < Config::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;

  if (plan.tiles > 0) {
    ptx::wait(shared.k_full, 0);
    if (plan.key_count < params.key_count && plan.key_count < plan.first_key + Config::kKeys) {
      ptx::wait(shared.v_full, 0);
      clear_tail<Config>(shared, plan.key_count - plan.first_key);
    }

    QueryWalk walk(params, plan);
    // Operands are made where they are used: kept over the loop, each of their addresses would take a register.
    const auto start_scores = [&](float(&scores)[kQueries / 2], int stage) {
      Operands::template start_scores<T>(scores, RowMajor(Operands::address(shared.k[0][64 * consumer])),
                                         RowMajor(Operands::address(shared.q[stage])));
    };
    const auto start_dp = [&](float(&dp)[kQueries / 2], int stage) {
      Operands::template start_scores<T>(dp, RowMajor(Operands::address(shared.v[0][64 * consumer])),
                                         RowMajor(Operands::address(shared.dout[stage])));
    };
    // dq[64 columns, queries] = k^T ds^T over all keys: 64 columns of k, kSharedQueries rows of dS.
    const auto start_dq = [&](float(&dq)[Config::kSharedQueries / 2], int buffer) {
      const int chunk = Config::kChunks == 1 ? 0 : consumer;
      const int row = Config::kChunks == 1 ? consumer * Config::kSharedQueries : 0;
      Operands::template start_dq<T>(dq, RowMajor(Operands::address(shared.k[chunk])),
                                     RowMajor(Operands::address(shared.ds[buffer][0][row])));
    };
    const LanePlaces<Config, BackwardShared<Config>> places(shared, consumer);
    const auto exponentiate_next = [&](float(&scores)[kQueries / 2], int stage) {
      exponentiate<Config>(scores, params, plan, places, consumer, stage, walk.tile);
    };

    float scores[kQueries / 2], dp[kQueries / 2];
    ptx::wait(shared.q_full[0], 0);
    start_scores(scores, 0);
    ptx::wait(shared.v_full, 0);
    ptx::wait(shared.dout_full[0], 0);
    start_dp(dp, 0);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    ptx::pin_registers(dp);
    exponentiate_next(scores, 0);
    handover.give_first_turn();

    // Each round begins with P^T and dP^T of its queries and ends with those of the next. No product runs on from round
    // to round: the assembler would wait for every single one. For the same reason the last round is like the others;
    // it starts the next one's products on whatever is there, as the first one does those for a late dQ.
    const int steps = plan.tiles * params.group;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2;
      walk.advance(plan);
      std::uint32_t weights[kQueries / 4], ds[kQueries / 4];
      pack_operand<T>(weights, scores);
      const auto start_dv = [&] {
        Operands::template start_sums<T>(dv, weights, Columns(Operands::address(shared.dout[stage])));
      };
      if constexpr (Config::kEarlyValues) start_dv();
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 two = places.row_pair(stage, 1, j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * j + 2 * i;
          ds[2 * j + i] = pack<T>(scores[at] * (dp[at] - two.x), scores[at + 1] * (dp[at + 1] - two.y));
        }
      }
      handover.await_buffer(step);
      const std::uint32_t ds_to = places.ds_buffer(stage);
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) ptx::store_transposed(ds_to + i * 16 * 128, ds + 4 * i);
      ptx::fence_async_proxy();
      handover.hand_over(step);
      handover.await_turn();
      if constexpr (!Config::kEarlyValues) start_dv();
      Operands::template start_sums<T>(dk, ds, Columns(Operands::address(shared.q[stage])));

      // Fresh ones: old values would count as read by the products, and keep their registers until then.
      float next_scores[kQueries / 2], next_dp[kQueries / 2], dq[Config::kSharedQueries / 2];
      const int next = (step + 1) % 2, parity = (step + 1) / 2 % 2;
      const bool more = step + 1 < steps;
      if (more) ptx::wait(shared.q_full[next], parity);
      start_scores(next_scores, next);
      const int dq_step = step - (Config::kLate ? 1 : 0);
      handover.await_whole(dq_step);
      ptx::wgmma_wait<1>();  // dV and dK: frees the registers of P^T and dS^T
      ptx::pin_registers(dv);
      ptx::pin_registers(dk);
      release(shared.dout_empty[stage]);
      ptx::arrive(shared.q_empty[stage]);  // every thread: each read what lies beside the queries
      start_dq(dq, dq_step & 1);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(next_scores);
      ptx::pin_registers(dq);
      handover.pass_turn(more);
      if (!Config::kLate || step > 0) {
        handover.give_back(dq_step);
        stage_dq(shared, dq, consumer, dq_step);
      }
      // Here and not above: its loop keeps the assembler from holding the registers of dQ and of dP at the same time.
      if (more) ptx::wait(shared.dout_full[next], parity);
      start_dp(next_dp, next);
      exponentiate_next(next_scores, next);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(next_dp);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) scores[i] = next_scores[i], dp[i] = next_dp[i];
    }
    if constexpr (Config::kLate) {
      float dq[Config::kSharedQueries / 2];
      handover.await_whole(steps - 1);
      start_dq(dq, (steps - 1) % 2);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(dq);
      stage_dq(shared, dq, consumer, steps - 1);
    }
  }
  store_keys<T, Config>(params, plan, consumer, dk, dv);
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&params.q, &params.k, &params.v, &params.dout_blocks}) ptx::prefetch_map(*map);
    ptx::init_barrier(shared.k_full, 1);
    ptx::init_barrier(shared.v_full, 1);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::init_barrier(shared.q_full[stage], 1);
      ptx::init_barrier(shared.dout_full[stage], 1);
      ptx::init_barrier(shared.q_empty[stage], kConsumerThreads);
      ptx::init_barrier(shared.dout_empty[stage], kConsumerWarps);
    }
    for (int consumer = 0; consumer < 2; ++consumer) {
      ptx::init_barrier(shared.dq_full[consumer], ptx::kWarpgroupThreads);
      ptx::init_barrier(shared.dq_empty[consumer], 1);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {
      ptx::init_barrier(shared.ds_full[buffer], kConsumerWarps);
      ptx::init_barrier(shared.ds_empty[buffer], kConsumerWarps);
    }
    ptx::publish_barriers();
    shared.plan = plan_keys<Config>(params, take_place<Config>(params));
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / ptx::kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce(params, shared);
    if (threadIdx.x == 32 || threadIdx.x == 64) add_dq(params, shared, static_cast<int>(threadIdx.x) / 32 - 1);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume<T, Config>(params, shared, warpgroup - 1);
  }
}

}  // namespace adaattn::cuda::sm90
