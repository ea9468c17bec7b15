// Exact gradients for sm_90a with a warpgroup of its own for dQ; the formulas are kernel.cuh's.
//
// Two consumers of 64 keys each compute S^T, P^T, dP^T and dS^T and sum up dV and dK. They never meet: each hands its
// dS to the first warpgroup, which multiplies all of it with K (split_sums.cuh). A consumer waits for copies and for
// its buffer of dS alone, so that one computes while the other multiplies. Faster than kernel.cuh where D is 64 and
// there are many queries; at D 128 shared memory cannot feed three warpgroups.
#pragma once

#include "cuda/sm90/backward/split_sums.cuh"

namespace adaattn::cuda::sm90 {

template <typename T, typename Config>
__device__ __forceinline__ void multiply(const BackwardParams& params, SplitShared<Config>& shared, int consumer) {
  using Operands = BackwardOperands<Config>;
  using RowMajor = typename Operands::RowMajor;
  using Columns = typename Operands::Columns;
  constexpr int kQueries = Config::kQueries;
  const KeyPlan& plan = shared.plan;  // stays in shared memory: registers are scarce
  float dk[Config::kDim / 2], dv[Config::kDim / 2];
#pragma unroll
  for (int i = 0; i < Config::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;

  if (plan.tiles > 0) {
    ptx::wait(shared.k_full, 0);
    if (plan.key_count < params.key_count && plan.key_count < plan.first_key + Config::kKeys) {
      ptx::wait(shared.v_full, 0);
      clear_tail<Config>(shared, plan.key_count - plan.first_key);
    }
    int tile = plan.first_tile;
    const LanePlaces<Config, SplitShared<Config>> places(shared, consumer);
    const auto start_scores = [&](float(&scores)[kQueries / 2], int stage) {
      Operands::template start_scores<T>(scores, RowMajor(Operands::address(shared.k[0][64 * consumer])),
                                         RowMajor(Operands::address(shared.q[stage])));
    };
    const auto start_dp = [&](float(&dp)[kQueries / 2], int stage) {
      Operands::template start_scores<T>(dp, RowMajor(Operands::address(shared.v[0][64 * consumer])),
                                         RowMajor(Operands::address(shared.dout[stage])));
    };
    const auto exponentiate_next = [&](float(&scores)[kQueries / 2], int stage) {
      exponentiate<Config>(scores, params, plan, places, consumer, stage, tile);
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

    // Rounds as in kernel.cuh: each begins with P^T and dP^T of its queries and ends with those of the next.
    const int steps = plan.tiles * params.group;
    ptx::RingPlace<Config::kStages> place, ahead;
    ahead.advance();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (++tile == plan.first_tile + plan.tiles) tile = plan.first_tile;  // the next head's first
      const int stage = place.stage, buffer = step % 2;
      std::uint32_t weights[kQueries / 4], ds[kQueries / 4];
      ptx::wait(shared.ds_empty[buffer], step / 2 % 2 ^ 1);
      const std::uint32_t ds_to = places.ds_buffer(buffer);
#pragma unroll
      for (int k = 0; k < kQueries / 16; ++k) {
#pragma unroll
        for (int j = 2 * k; j < 2 * k + 2; ++j) {
          const float2 two = places.row_pair(stage, 1, j);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = 4 * j + 2 * i;
            ds[2 * j + i] = pack<T>(scores[at] * (dp[at] - two.x), scores[at + 1] * (dp[at + 1] - two.y));
            weights[2 * j + i] = pack<T>(scores[at], scores[at + 1]);
          }
        }
        ptx::store_transposed(ds_to + k * 16 * 128, ds + 4 * k);
      }
      ptx::fence_async_proxy();
      ptx::barrier_arrive(kDsBarrier + buffer, Config::kThreads);

      float next_scores[kQueries / 2], next_dp[kQueries / 2];
      const int next = ahead.stage;
      const std::uint32_t parity = ahead.parity;
      const bool more = step + 1 < steps;
      Operands::template start_sums<T>(dv, weights, Columns(Operands::address(shared.dout[stage])));
      Operands::template start_sums<T>(dk, ds, Columns(Operands::address(shared.q[stage])));
      if (more) ptx::wait(shared.q_full[next], parity);
      start_scores(next_scores, next);
      ptx::wgmma_wait<1>();  // dV and dK: frees the registers of P^T and dS^T
      ptx::pin_registers(dv);
      ptx::pin_registers(dk);
      release(shared.empty[stage]);
      if (more) ptx::wait(shared.dout_full[next], parity);
      start_dp(next_dp, next);
      ptx::wgmma_wait<1>();
      ptx::pin_registers(next_scores);
      exponentiate_next(next_scores, next);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(next_dp);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) scores[i] = next_scores[i], dp[i] = next_dp[i];
      place.advance();
      ahead.advance();
    }
  }
  store_keys<T, Config>(params, plan, consumer, dk, dv);
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    split_backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SplitShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&params.q, &params.k, &params.v, &params.dout_blocks}) ptx::prefetch_map(*map);
    ptx::init_barrier(shared.k_full, 1);
    ptx::init_barrier(shared.v_full, 1);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::init_barrier(shared.q_full[stage], 1);
      ptx::init_barrier(shared.dout_full[stage], 1);
      ptx::init_barrier(shared.empty[stage], kConsumerWarps);
    }
    for (int buffer = 0; buffer < 2; ++buffer) ptx::init_barrier(shared.ds_empty[buffer], 4);
    ptx::publish_barriers();
    shared.plan = plan_keys<Config>(params, static_cast<int>(blockIdx.x));
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / ptx::kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kSumsRegisters>();
    sum_dq<T, Config>(params, shared);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    multiply<T, Config>(params, shared, warpgroup - 1);
  }
}

}  // namespace adaattn::cuda::sm90
