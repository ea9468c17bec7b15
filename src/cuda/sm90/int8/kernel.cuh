// Attention with 8-bit scores and 16-bit values, forward, for sm_90a: persistent and warp-specialised as the exact
// kernel (forward/kernel.cuh). What the bytes stand for, and why no maximum is followed: config.h.
#pragma once

#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_bytes.cuh"
#include "cuda/common/ptx/wgmma_rs_sums.cuh"
#include "cuda/sm90/int8/epilogue.cuh"
#include "cuda/sm90/int8/produce.cuh"
#include "cuda/sm90/int8/queries.cuh"
#include "cuda/sm90/int8/softmax.cuh"

namespace adaattn::cuda::sm90 {

template <typename Config>
using ByteRows = ptx::ByteOperand<Config::kDim>;  // q8 and k8
template <typename Config>
using Values = ptx::WgmmaOperand<Config::kKeys * 128>;

// sums = q8 k8^T, one group of products.
template <typename Config>
__device__ __forceinline__ void start_sums(int (&sums)[Config::kKeys / 2], ByteRows<Config> q, ByteRows<Config> k) {
  ptx::pin_registers(sums);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kDim / 32; ++i) ptx::wgmma_s8_ss(sums, q.at(32 * i), k.at(32 * i), i > 0);
  ptx::wgmma_commit();
}

// out += p v, one group of products.
template <typename Config>
__device__ __forceinline__ void start_values(float (&out)[Config::kOutputs], std::uint32_t (&p)[Config::kKeys / 4],
                                             Values<Config> v) {
  ptx::pin_registers(out);
  ptx::pin_registers(p);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kKeys / 16; ++i) ptx::wgmma_rs<__nv_bfloat16>(out, p + 4 * i, v.at(i * 16 * 128), 1);
  ptx::wgmma_commit();
}

// Values at and after the key length may be anything, and 0 * NaN is NaN: write zeros over them. Only the first block a
// tile visits can hold such keys.
template <typename Config>
__device__ __forceinline__ void clear_tail(Int8Shared<Config>& shared, int stage, int first) {
  for (int i = first * 8 + static_cast<int>(threadIdx.x) - 128; i < Config::kKeys * 8; i += 128 * Config::kConsumers)
    for (int chunk = 0; chunk < Config::kChunks; ++chunk)
      reinterpret_cast<uint4*>(shared.v[stage][chunk])[i] = make_uint4(0, 0, 0, 0);
  ptx::fence_async_proxy();
  ptx::barrier_sync(1 + Config::kConsumers, 128 * Config::kConsumers);
}

// Meets the warpgroup at a named barrier.
__device__ __forceinline__ bool all_of_warpgroup(int barrier, bool value) {
  int result;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.b32 p, %2, 0;\n"
      "barrier.red.and.pred.aligned q, %1, 128, p;\nselp.b32 %0, 1, 0, q;\n}\n"
      : "=r"(result)
      : "r"(barrier), "r"(static_cast<int>(value))
      : "memory");
  return result != 0;
}

template <typename Config>
__device__ __forceinline__ void consume_int8(const Int8Params& params, Int8Shared<Config>& shared, int consumer) {
  constexpr int kKeys = Config::kKeys;
  const int own_barrier = 1 + consumer;
  const auto address = [](const auto& object) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(&object)); };
  const auto release_values = [&](ptx::Barrier& barrier) {
    if (ptx::thread_in_warpgroup() % 32 == 0) ptx::arrive(barrier);
  };
  const auto release_keys = [](ptx::Barrier& barrier) { ptx::arrive(barrier); };  // every thread: each read their scale
  const ByteRows<Config> q(address(shared.q[consumer]));
  ptx::RingPlace<Config::kStages> k_place, v_place;
  ptx::RingPlace<1> plan_place;

  for (;;) {
    ptx::wait(shared.plan_full[consumer], plan_place.parity);
    const TilePlan& plan = shared.plan[plan_place.parity][consumer];  // registers are scarce
    unsigned& failed = shared.failed[plan_place.parity][consumer];
    plan_place.advance();
    if (plan.kind == TilePlan::kEnd) return;
    ptx::arrive(shared.plan_empty[consumer]);  // for the tile after next
    if (plan.kind == TilePlan::kIdle) continue;
    const StripPlan strip = plan_strip<Config>(params.grid, plan, consumer);
    const auto tile_row = [&] {
      const int thread = ptx::thread_in_warpgroup();
      return 64 * consumer + 16 * (thread / 32) + thread % 32 / 4;
    };
    const auto find_hidden = [&](int step, HiddenKeys(&hidden)[2]) {
      const int first_key = block_of_step(plan, step) * kKeys + 2 * (ptx::thread_in_warpgroup() % 4);
      const Visibility visibility = visibility_of(params.grid, plan.key_count);
      hidden[0] = hidden_keys(visibility, plan.first_query + tile_row(), first_key);
      hidden[1] = hidden_keys(visibility, plan.first_query + tile_row() + 8, first_key);
    };
    const bool left_limited = params.grid.visibility.left < kUnlimited;
    ptx::barrier_sync(own_barrier, ptx::kWarpgroupThreads);  // the queries before are used
    QueryRow(&query_rows)[64] = shared.rows[consumer];
    const RowScales rows =
        quantize_queries<Config>(params, shared.q[consumer], query_rows, plan, plan.first_query + 64 * consumer);
    const auto read_references = [&](float(&reference)[2]) {
      reference[0] = query_rows[tile_row() % 64].reference, reference[1] = query_rows[tile_row() % 64 + 8].reference;
    };
    ptx::fence_async_proxy();
    float reference[2];
    read_references(reference);
    const bool by_products =
        all_of_warpgroup(own_barrier, fmaxf(reference[0], reference[1]) <= kMostByProducts &&
                                          reference[0] == reference[0] && reference[1] == reference[1] &&  // not NaN
                                          plan.kind == TilePlan::kSteady);

    float out[Config::kOutputs];
#pragma unroll
    for (float& value : out) value = 0.0f;
    int sums[kKeys / 2];

    if (plan.kind == TilePlan::kCareful) {
      // The largest score becomes the reference; keys come a second time then.
      float tops[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
      for (int step = 0; step < plan.steps; ++step) {
        ptx::wait(shared.k_full[k_place.stage], k_place.parity);
        if (step >= strip.first_step) {
          start_sums<Config>(sums, q, ByteRows<Config>(address(shared.k[k_place.stage])));
          ptx::wgmma_wait<0>();
          ptx::pin_registers(sums);
          HiddenKeys hidden[2];
          find_hidden(step, hidden);
          int largest[2];
          largest_sums(sums, hidden, largest);
#pragma unroll
          for (int row = 0; row < 2; ++row)
            if (largest[row] != INT_MIN)
              tops[row] = fmaxf(
                  tops[row], static_cast<float>(largest[row]) * (rows.scale[row] * shared.tile[k_place.stage].scale));
        }
        release_keys(shared.k_empty[k_place.stage]);
        k_place.advance();
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        tops[row] = fmaxf(tops[row], __shfl_xor_sync(0xFFFFFFFFu, tops[row], 1));
        tops[row] = fmaxf(tops[row], __shfl_xor_sync(0xFFFFFFFFu, tops[row], 2));
        reference[row] = tops[row] == -INFINITY ? 0.0f : tops[row];
        if (ptx::thread_in_warpgroup() % 4 == 0) query_rows[tile_row() % 64 + 8 * row].reference = reference[row];
      }
      __syncwarp();
    }
    int addend[2] = {fixed_addend(reference[0]), fixed_addend(reference[1])};
    ptx::pin_registers(addend);  // or they are computed anew each step

    if (plan.key_count < params.grid.key_count && plan.steps > 0)
      if (const int tail = plan.key_count - block_of_step(plan, 0) * kKeys; tail < kKeys) {
        ptx::wait(shared.v_full[v_place.stage], v_place.parity);
        clear_tail(shared, v_place.stage, tail);
      }

    // Blocks that only other consumers need: hand them on.
    for (int step = 0; step < strip.first_step; ++step) {
      ptx::wait(shared.k_full[k_place.stage], k_place.parity);
      release_keys(shared.k_empty[k_place.stage]);
      k_place.advance();
      ptx::wait(shared.v_full[v_place.stage], v_place.parity);
      release_values(shared.v_empty[v_place.stage]);
      v_place.advance();
    }

    if (strip.first_step < plan.steps) {
      std::uint32_t p[kKeys / 4];
      const int steps = plan.steps;
      int step = strip.first_step + 1;
      {
        ptx::wait(shared.k_full[k_place.stage], k_place.parity);
        const RowFactors factors = row_factors(rows.scale, addend, shared.tile[k_place.stage].scale);
        start_sums<Config>(sums, q, ByteRows<Config>(address(shared.k[k_place.stage])));
        ptx::wgmma_wait<0>();
        ptx::pin_registers(sums);
        release_keys(shared.k_empty[k_place.stage]);
        k_place.advance();
        HiddenKeys hidden[2];
        find_hidden(strip.first_step, hidden);
        exponentiate_and_hide(sums, factors, reference, left_limited, hidden);
        pack_powers(p, sums);
      }
      // Tests whether the next blocks have come are made early, so that their answers are there when they are needed.
      bool keys_came = false, values_came = false;
      // kHide: blocks may hold keys that a row does not see. kFinish: the powers of the step before are to be finished;
      // the operands' addresses, which take a while, are made beside that.
      const auto advance = [&]<bool kHide, bool kFinish>() __attribute__((always_inline)) {
        const ByteRows<Config> k(address(shared.k[k_place.stage]));
        const Values<Config> v(address(shared.v[v_place.stage]));
        if constexpr (kFinish) finish_powers(p, sums);
        if (!keys_came) ptx::wait(shared.k_full[k_place.stage], k_place.parity);
        start_sums<Config>(sums, q, k);
        if (!values_came) ptx::wait(shared.v_full[v_place.stage], v_place.parity);
        start_values<Config>(out, p, v);
        const RowFactors factors = row_factors(rows.scale, addend, shared.tile[k_place.stage].scale);
        ptx::wgmma_wait<1>();
        ptx::pin_registers(sums);
        release_keys(shared.k_empty[k_place.stage]);
        k_place.advance();
        keys_came = ptx::has_completed(shared.k_full[k_place.stage], k_place.parity);
        if constexpr (kHide) {
          HiddenKeys hidden[2];
          find_hidden(step, hidden);
          float relative_to[2];
          read_references(relative_to);
          exponentiate_and_hide(sums, factors, relative_to, left_limited, hidden);
        } else {
          start_powers(sums, factors);
        }
        ptx::wgmma_wait<0>();
        ptx::pin_registers(out);
        ptx::pin_registers(p);
        release_values(shared.v_empty[v_place.stage]);
        v_place.advance();
        values_came = ptx::has_completed(shared.v_full[v_place.stage], v_place.parity);
        if constexpr (kHide) pack_powers(p, sums);
      };
      // Steps in [full_begin, full_end) hide nothing.
      const int full_begin = by_products ? clamp_int(plan.block_end - strip.full_end, step, steps) : steps;
      const int full_end = most(full_begin, least(plan.block_end - strip.full_begin, plan.window_steps));
#pragma unroll 1
      for (int until = full_begin;; until = steps) {
#pragma unroll 1
        for (; step < until; ++step) advance.template operator()<true, false>();
        if (until == steps) break;
        if (step < full_end) {
          advance.template operator()<false, false>();
          ++step;
#pragma unroll 1
          for (; step < full_end; ++step) advance.template operator()<false, true>();
          finish_powers(p, sums);
        }
      }
      ptx::wait(shared.v_full[v_place.stage], v_place.parity);
      start_values<Config>(out, p, Values<Config>(address(shared.v[v_place.stage])));
      ptx::wgmma_wait<0>();
      ptx::pin_registers(out);
      release_values(shared.v_empty[v_place.stage]);
      v_place.advance();
    }
    if (plan.kind == TilePlan::kSteady) {
      bool wrong = false;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int query = plan.first_query + tile_row() + 8 * row;
        const KeyRange seen = visible_keys(visibility_of(params.grid, plan.key_count), query, query);
        wrong |=
            query < params.grid.query_count && (seen.begin < seen.end || seen.sink_end > 0) && row_failed(out, row);
      }
      if (__any_sync(0xFFFFFFFFu, wrong)) {  // the whole tile is done again: other rows' results do not count
        if (ptx::thread_in_warpgroup() % 32 == 0) atomicOr(&failed, 1u);
        continue;
      }
    }
    store_int8_tile<Config>(params, plan, tile_row(), out, query_rows);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) int8_forward_kernel(const __grid_constant__ Int8Params params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Int8Shared<Config>*>(memory);
  constexpr std::uint32_t kOnes = 0x3F803F80u;
  for (int stage = 0; stage < Config::kStages; ++stage)
    for (int i = threadIdx.x; i < Config::kKeys * 8; i += Config::kThreads)
      reinterpret_cast<uint4*>(shared.v[stage][Config::kChunks])[i] = make_uint4(kOnes, kOnes, kOnes, kOnes);
  ptx::fence_async_proxy();
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    for (int part = 0; part < Config::kConsumers; ++part) {
      ptx::init_barrier(shared.plan_full[part], 1);
      ptx::init_barrier(shared.plan_empty[part], ptx::kWarpgroupThreads);
      shared.failed[0][part] = shared.failed[1][part] = 0;
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::init_barrier(shared.k_full[stage], 1);
      ptx::init_barrier(shared.v_full[stage], 1);
      ptx::init_barrier(shared.k_empty[stage], ptx::kWarpgroupThreads * Config::kConsumers);
      ptx::init_barrier(shared.v_empty[stage], kConsumerWarps);
    }
    ptx::publish_barriers();
    ptx::prefetch_map(params.k), ptx::prefetch_map(params.v);
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / ptx::kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce_int8(params, shared);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume_int8<Config>(params, shared, warpgroup - 1);
  }
}

}  // namespace adaattn::cuda::sm90
