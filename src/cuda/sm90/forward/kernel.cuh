// Exact attention, forward, for sm_90a: a persistent, warp-specialised kernel.
//
// One thread of the producer warpgroup copies queries, keys and values into shared memory (TMA). Each consumer
// warpgroup keeps 64 query rows: while its softmax works on one block of scores, the tensor cores compute the product
// of the block before with V and, in turn, the other consumers' products. The schedule is FlashAttention-3's (arXiv
// 2407.08608): next Q K^T before the current P V, consumers taking turns at the tensor cores.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/thread.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_rs.cuh"
#include "cuda/common/ptx/wgmma_ss.cuh"
#include "cuda/sm90/forward/config.h"
#include "cuda/sm90/forward/epilogue.cuh"
#include "cuda/sm90/forward/mask.cuh"
#include "cuda/sm90/forward/produce.cuh"
#include "cuda/sm90/forward/softmax.cuh"
#include "cuda/sm90/forward/tile_plan.h"

namespace adaattn::cuda::sm90 {

template <typename Config>
using RowMajor = ptx::WgmmaOperand<0>;  // q and k: the product's k runs along their rows
template <typename Config>
using ColumnMajor = ptx::WgmmaOperand<Config::kKeys * 128>;  // v

// What is multiplied: float32 as sums of bfloat16.
template <typename T>
using Factor = std::conditional_t<std::is_same_v<T, float>, __nv_bfloat16, T>;

// The products of terms that make up a product: of both first terms alone, or, least first since sums are cut off and
// not rounded, those of the left one's second term, the right one's second, and both first. What is left out, the
// product of both second terms, is up to 2^-18 of the whole.
template <typename Config>
struct TermPairs {
  static constexpr int kCount = Config::kTerms == 1 ? 1 : 3;
  static constexpr int left(int pair) { return kCount == 3 && pair == 0 ? 1 : 0; }
  static constexpr int right(int pair) { return kCount == 3 && pair == 1 ? 1 : 0; }
};

// scores = q k^T, one group of products.
template <typename T, typename Config>
__device__ __forceinline__ void start_scores(float (&scores)[Config::kKeys / 2], RowMajor<Config> q,
                                             RowMajor<Config> k) {
  ptx::pin_registers(scores);
  ptx::wgmma_fence();
  using Pairs = TermPairs<Config>;
#pragma unroll
  for (int pair = 0; pair < Pairs::kCount; ++pair)
#pragma unroll
    for (int i = 0; i < Config::kDim / 16; ++i) {
      const int q_chunk = Pairs::left(pair) * Config::kChunks + i / 4, within = i % 4 * 32;
      const int k_chunk = Pairs::right(pair) * Config::kChunks + i / 4;
      ptx::wgmma_ss<Factor<T>>(scores, q.at(q_chunk * Config::kQueries * 128 + within),
                               k.at(k_chunk * Config::kKeys * 128 + within), pair + i > 0);
    }
  ptx::wgmma_commit();
}

// out += p v, with two terms out = p v, one group of products.
template <typename T, typename Config>
__device__ __forceinline__ void start_output(float (&out)[Config::kDim / 2],
                                             std::uint32_t (&p)[Config::kTerms * Config::kKeys / 4],
                                             ColumnMajor<Config> v) {
  using Pairs = TermPairs<Config>;
  constexpr int kSteps = Config::kKeys / 16;
  ptx::pin_registers(out);
  ptx::pin_registers(p);
  ptx::wgmma_fence();
#pragma unroll
  for (int product = 0; product < Pairs::kCount * kSteps; ++product) {
    const int pair = product / kSteps, i = product % kSteps;
    ptx::wgmma_rs<Factor<T>>(out, p + 4 * (Pairs::left(pair) * kSteps + i),
                             v.at((Pairs::right(pair) * Config::kChunks * Config::kKeys + i * 16) * 128),
                             Config::kTerms == 1 || product > 0);
  }
  ptx::wgmma_commit();
}

// Values at and after the key length may be anything, and 0 * NaN is NaN: write zeros over them. Only the first block a
// tile visits can hold such keys.
template <typename Config>
__device__ __forceinline__ void clear_tail(ForwardShared<Config>& shared, int stage, int first) {
  for (int i = first * 8 + static_cast<int>(threadIdx.x) - 128; i < Config::kKeys * 8; i += 128 * Config::kConsumers)
    for (int chunk = 0; chunk < Config::kStoredChunks; ++chunk)
      reinterpret_cast<uint4*>(shared.v[stage][chunk])[i] = make_uint4(0, 0, 0, 0);
  ptx::fence_async_proxy();
  ptx::barrier_sync(1 + Config::kConsumers, 128 * Config::kConsumers);
}

template <bool kFirst, typename Object>
__device__ __forceinline__ Object& choose(Object& first, Object& second) {
  if constexpr (kFirst)
    return first;
  else
    return second;
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const ForwardParams& params, ForwardShared<Config>& shared, int consumer) {
  constexpr int kKeys = Config::kKeys, kTurnThreads = 2 * ptx::kWarpgroupThreads;
  constexpr bool kKeeps = keeps_reference<T, Config>();
  const int query_part = Config::kQueryParts > 1 ? consumer : 0;
  // With two terms registers are scarcer still: what depends on the consumer is made anew where it is used.
  const auto own_index = [&]() -> int {
    if constexpr (Config::kTerms == 1)
      return consumer;
    else
      return static_cast<int>(ptx::fresh_thread_index()) / ptx::kWarpgroupThreads - 1;
  };
  const auto turn = [&] { return 1 + own_index(); };
  const auto next_turn = [&] { return 1 + (own_index() + 1) % Config::kConsumers; };
  const auto address = [](const auto& object) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(&object)); };
  const auto release = [&](ptx::Barrier& barrier) {
    if (ptx::thread_in_warpgroup() % 32 == 0) ptx::arrive(barrier);
  };
  const RowMajor<Config> kept_q(address(shared.q[0][64 * consumer]));
  const auto own_q = [&] {
    if constexpr (Config::kTerms == 1)
      return kept_q;
    else
      return RowMajor<Config>(address(shared.q[0][64 * own_index()]));
  };
  ptx::RingPlace<Config::kStages> k_place, v_place;
  ptx::RingPlace<1> q_place;

  if (Config::kTakeTurns && consumer == Config::kConsumers - 1) ptx::barrier_arrive(next_turn(), kTurnThreads);
  for (;;) {
    ptx::wait(shared.q_full[query_part], q_place.parity);
    const TilePlan& plan = shared.plan[q_place.parity][query_part];  // registers are scarce
    unsigned& failed = shared.failed[q_place.parity][query_part];
    q_place.advance();
    if (plan.kind == TilePlan::kEnd) break;
    if (kKeeps && plan.kind == TilePlan::kIdle) {
      ptx::arrive(shared.q_empty[query_part]);
      continue;
    }
    const StripPlan strip = plan_strip<Config>(params.grid, plan, consumer);
    const auto tile_row = [&] {
      const int thread = ptx::thread_in_warpgroup();
      return 64 * own_index() + 16 * (thread / 32) + thread % 32 / 4;
    };
    const auto finish_scores = [&](float(&scores)[kKeys / 2], int step) {
      const int block = block_of_step(plan, step);
      const int first_key = block * kKeys + 2 * (ptx::thread_in_warpgroup() % 4);
      if constexpr (Config::kMasks) {
        const Visibility visibility = visibility_of(params.grid, plan.key_count);
        const RowPlace rows[2] = {place_of_row<Config>(params.grid, plan, tile_row()),
                                  place_of_row<Config>(params.grid, plan, tile_row() + 8)};
        scale_and_mask<T>(scores, params, plan.batch, rows, visibility, first_key);
      }
      if (block >= strip.full_begin && block < strip.full_end) return;
      const int queries[2] = {query_of_row<Config>(params.grid, plan.first_query, tile_row()),
                              query_of_row<Config>(params.grid, plan.first_query, tile_row() + 8)};
      hide(scores, params.grid, plan.key_count, queries, first_key);
    };
    const float scale_log2 = Config::kMasks ? 1.0f : params.scale_log2;
    const auto give_queries_back = [&] { ptx::arrive(shared.q_empty[query_part]); };  // every thread of the consumer
    float out[Config::kDim / 2];
#pragma unroll
    for (float& value : out) value = 0.0f;
    // With two terms each step's products add up from zero, and are added to out by instructions that round: the tensor
    // cores cut sums off, and over many steps that adds up. The correction is then applied a step later, in that
    // addition.
    constexpr bool kAddsSteps = Config::kTerms > 1;
    float of_step[Config::kDim / 2];
    auto& sums = choose<kAddsSteps>(of_step, out);
    RowState state;
    bool steady = false;  // whether references were kept

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
        ptx::barrier_sync(turn(), kTurnThreads);
        ptx::barrier_arrive(next_turn(), kTurnThreads);
      }
    }

    if (strip.first_step < plan.steps) {
      float scores[kKeys / 2], correction[2];
      std::uint32_t p[Config::kTerms * kKeys / 4];
      ptx::wait(shared.k_full[k_place.stage], k_place.parity);
      start_scores<T, Config>(scores, own_q(), RowMajor<Config>(address(shared.k[k_place.stage])));
      ptx::wgmma_wait<0>();
      ptx::pin_registers(scores);
      release(shared.k_empty[k_place.stage]);
      k_place.advance();
      finish_scores(scores, strip.first_step);
      const float first_tops[2] = {row_max(scores, 0), row_max(scores, 1)};
      exponentiate<Config::kMasks>(scores, first_tops, state, correction, scale_log2);
      pack_operand<Factor<T>>(p, scores);

      // Tests whether the next blocks have come are made early, so that their answers are there when they are needed: a
      // step's chain of latencies is what bounds the kernel, not its instructions.
      const int kept_steps = plan.steps;
      const int& steps = Config::kTerms == 1 ? kept_steps : plan.steps;  // the plan is in shared memory
      int step = strip.first_step + 1;
      bool keys_came = false, values_came = false;
      if (step == steps) give_queries_back();
      // kHide: blocks may hold keys that a row does not see. kSteady: references are kept.
      const auto advance = [&]<bool kHide, bool kSteady>() __attribute__((always_inline)) {
        const RowMajor<Config> k(address(shared.k[k_place.stage]));
        const ColumnMajor<Config> v(address(shared.v[v_place.stage]));
        if (!keys_came) ptx::wait(shared.k_full[k_place.stage], k_place.parity);
        if constexpr (Config::kTakeTurns) ptx::barrier_sync(turn(), kTurnThreads);
        start_scores<T, Config>(scores, own_q(), k);
        if (!values_came) ptx::wait(shared.v_full[v_place.stage], v_place.parity);
        start_output<T, Config>(sums, p, v);
        if constexpr (Config::kTakeTurns) ptx::barrier_arrive(next_turn(), kTurnThreads);
        ptx::wgmma_wait<1>();
        ptx::pin_registers(scores);
        release(shared.k_empty[k_place.stage]);
        k_place.advance();
        if (step + 1 == steps) give_queries_back();
        if constexpr (kHide) finish_scores(scores, step);
        float tops[2];
        if constexpr (!kSteady) tops[0] = row_max(scores, 0), tops[1] = row_max(scores, 1);
        if constexpr (Config::kTerms == 1) keys_came = ptx::has_completed(shared.k_full[k_place.stage], k_place.parity);
        [[maybe_unused]] const float before[2] = {correction[0], correction[1]};
        constexpr bool kEarly = kSteady && Config::kHalfEarly;
        if constexpr (kEarly) {
          const float sum = exponentiate_kept(scores, 0, state, scale_log2);
          state.sum[0] += sum;
          stay_before(sum);
        }
        ptx::wgmma_wait<0>();
        ptx::pin_registers(sums);
        release(shared.v_empty[v_place.stage]);
        v_place.advance();
        if constexpr (Config::kTerms == 1)
          values_came = ptx::has_completed(shared.v_full[v_place.stage], v_place.parity);
        if constexpr (kAddsSteps) rescale_and_add(out, before, of_step);
        if constexpr (kSteady) {
          if constexpr (!kEarly) state.sum[0] += exponentiate_kept(scores, 0, state, scale_log2);
          state.sum[1] += exponentiate_kept(scores, 1, state, scale_log2);
        } else {
          exponentiate<Config::kMasks>(scores, tops, state, correction, scale_log2);
          if constexpr (!kAddsSteps) rescale(out, correction);
        }
        pack_operand<Factor<T>>(p, scores);
      };
      // Steps in [full_begin, full_end) hide nothing: in a loop of their own, without a word about what is visible.
      // With two terms there are no registers for that, nor for tests made early.
      const bool apart = !Config::kMasks && Config::kTerms == 1 && (!kKeeps || plan.kind == TilePlan::kSteady);
      const int full_begin =
          apart ? clamp_int(plan.block_end - (kKeeps ? strip.steady_end : strip.full_end), step, steps) : steps;
      const int full_end = most(full_begin, least(plan.block_end - strip.full_begin, plan.window_steps));
      steady = kKeeps && full_begin < full_end;
      for (int until = full_begin;; until = steps) {
#pragma unroll 1
        for (; step < until; ++step) advance.template operator()<true, false>();
        if (until == steps) break;
        if constexpr (!Config::kMasks && Config::kTerms == 1) {
#pragma unroll 1
          for (; step < full_end; ++step) advance.template operator()<false, kKeeps>();
        }
      }
      ptx::wait(shared.v_full[v_place.stage], v_place.parity);
      start_output<T, Config>(sums, p, ColumnMajor<Config>(address(shared.v[v_place.stage])));
      ptx::wgmma_wait<0>();
      ptx::pin_registers(sums);
      release(shared.v_empty[v_place.stage]);
      v_place.advance();
      if constexpr (kAddsSteps) rescale_and_add(out, correction, of_step);
    } else {
      give_queries_back();
    }
    if constexpr (kKeeps)
      if (steady) {
        const auto exists = [&](int row) {
          return place_of_row<Config>(params.grid, plan, tile_row() + 8 * row).exists;
        };
        bool doubtful = false, wrong = false;
#pragma unroll
        for (int row = 0; row < 2; ++row) doubtful |= exists(row) && !is_plainly_right(state, row, plan.key_count);
        if (__any_sync(0xFFFFFFFFu, doubtful)) {
#pragma unroll
          for (int row = 0; row < 2; ++row) wrong |= exists(row) && reference_failed(state, out, row);
        }
        if (__any_sync(0xFFFFFFFFu, wrong)) {  // the whole tile is done again: other rows' results do not count
          if (ptx::thread_in_warpgroup() % 32 == 0) atomicOr(&failed, 1u);
          continue;
        }
      }
    if (Config::kParts && plan.part != TilePlan::kWhole)
      store_part<Config>(params, plan, tile_row(), out, state);
    else if constexpr (Config::kStagesOutput)
      store_tile_staged<T, Config>(params, shared, plan, tile_row(), 4 * consumer + ptx::thread_in_warpgroup() / 32,
                                   out, state);
    else
      store_tile<T, Config>(params, plan, tile_row(), out, state);
  }
  if constexpr (Config::kStagesOutput) ptx::wait_sources_read();  // shared memory ends with the block
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
      shared.failed[0][part] = shared.failed[1][part] = 0;
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
    if (threadIdx.x == 0) produce<T>(params, shared);
  } else {
    if constexpr (Config::kTradesRegisters) ptx::take_registers<Config::kConsumerRegisters>();
    consume<T, Config>(params, shared, warpgroup - 1);
  }
}

}  // namespace adaattn::cuda::sm90
