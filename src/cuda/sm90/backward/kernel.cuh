// Exact gradients for sm_90a: recomputes the probabilities from lse (FlashAttention-2, arXiv 2307.08691, algorithm 2).
//
// A block of threads keeps 128 keys and values and walks over the queries that see them. Per block of queries, all of
// it transposed so that P^T and dS^T leave the tensor cores as the A operands of the next products:
//   S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta), dV += P^T dO, dK += dS^T Q,
//   dQ^T += K^T dS^T
// dV and dK stay in registers. dQ^T needs the dS of both consumers, which meet in shared memory, from where the copy
// engine adds it to sums in global memory. The next block's S^T starts before this block's dQ^T, so that its
// exponentials have products to hide behind. The scale on dQ and dK is left to the end.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_rs.cuh"
#include "cuda/common/ptx/wgmma_ss.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/query_gradient.cuh"
#include "cuda/sm90/backward/schedule.cuh"
#include "cuda/sm90/registers.cuh"

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
    load_queries(shared.dout, params.dout, shared.dout_full[place.stage]);
    place.advance();
    walk.advance(plan);
  }
}

// What lies in shared memory as operands; "columns" where the product's n runs along the head dimension.
template <typename Config>
struct BackwardOperands {
  using RowMajor = ptx::WgmmaOperand<0>;
  using Columns = ptx::WgmmaOperand<Config::kQueries * 128>;

  static __device__ __forceinline__ std::uint32_t address(const void* object) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(object));
  }

  // scores[64 keys, queries] = keys queries^T, one group of products.
  template <typename T>
  static __device__ __forceinline__ void start_scores(float (&scores)[Config::kQueries / 2], RowMajor keys,
                                                      RowMajor queries) {
    ptx::pin_registers(scores);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kDim / 16; ++i) {
      const int chunk = i / 4, within = i % 4 * 32;
      ptx::wgmma_ss<T>(scores, keys.at(chunk * Config::kKeys * 128 + within),
                       queries.at(chunk * Config::kQueries * 128 + within), i > 0);
    }
    ptx::wgmma_commit();
  }

  // sums[64 keys, dim] += weights[64 keys, queries] rows[queries, dim], one group of products.
  template <typename T>
  static __device__ __forceinline__ void start_sums(float (&sums)[Config::kDim / 2],
                                                    std::uint32_t (&weights)[Config::kQueries / 4], Columns rows) {
    ptx::pin_registers(sums);
    ptx::pin_registers(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kQueries / 16; ++i) ptx::wgmma_rs<T>(sums, weights + 4 * i, rows.at(i * 16 * 128), 1);
    ptx::wgmma_commit();
  }

  // dq[64 columns, queries] = k^T ds^T over all 128 keys, one group of products.
  template <typename T>
  static __device__ __forceinline__ void start_dq(float (&dq)[Config::kSharedQueries / 2], RowMajor k, RowMajor ds) {
    ptx::pin_registers(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kKeys / 16; ++i)
      ptx::wgmma_transposed_ss<T>(dq, k.at(i * 16 * 128), ds.at(i / 4 * Config::kQueries * 128 + i % 4 * 32), i > 0);
    ptx::wgmma_commit();
  }
};

// Keys and values at and after the key length may be anything, and 0 * NaN is NaN: write zeros over them.
template <typename Config>
__device__ __forceinline__ void clear_tail(BackwardShared<Config>& shared, int first) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int i = first * 8 + static_cast<int>(threadIdx.x) - 128; i < Config::kKeys * 8; i += 256)
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      reinterpret_cast<uint4*>(shared.k[chunk])[i] = zero;
      reinterpret_cast<uint4*>(shared.v[chunk])[i] = zero;
    }
  ptx::fence_async_proxy();
  ptx::barrier_sync(1, 256);
}

// Probabilities of query and key pairs that do not see each other become 0. first_key is this thread's upper row,
// first_query the query of p[0].
template <int kCount>
__device__ __forceinline__ void hide(float (&p)[kCount], const Visibility& visibility, int query_count, int first_key,
                                     int first_query) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const QueryRange seeing = seeing_queries(visibility, first_key + 8 * row, query_count);
    const int begin = seeing.begin - first_query, end = seeing.end - first_query;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int query = 8 * (i / 2) + i % 2;
      if (query < begin || query >= end) p[4 * (i / 2) + 2 * row + i % 2] = 0.0f;
    }
  }
}

// Rounds a consumer's 64 rows of dK or dV and writes them.
template <typename T, typename Config>
__device__ __forceinline__ void store_keys(void* gradient, const std::int64_t (&stride)[3], const KeyPlan& plan,
                                           int first_key, int key_count, int dim, const float (&sums)[Config::kDim / 2],
                                           float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int key = first_key + 8 * row;
    T* to = static_cast<T*>(gradient) + plan.batch * stride[0] + plan.key_head * stride[1] + key * stride[2];
#pragma unroll
    for (int j = 0; j < Config::kDim / 32; ++j) {  // 32 columns: one piece of 8 a lane
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * row;
        words[i] = pack<T>(sums[at] * factor, sums[at + 1] * factor);
      }
      const uint4 piece = transpose_quad(words, lane);
      const int column = 32 * j + 8 * (lane % 4);
      if (key < key_count && column < dim) *reinterpret_cast<uint4*>(to + column) = piece;
    }
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
  const auto release = [&](ptx::Barrier& barrier) {
    if (ptx::thread_in_warpgroup() % 32 == 0) ptx::arrive(barrier);
  };
  const auto first_key = [&] {
    const int thread = ptx::thread_in_warpgroup();
    return plan.first_key + 64 * consumer + 16 * (thread / 32) + thread % 32 / 4;
  };
  float dk[Config::kDim / 2], dv[Config::kDim / 2];
#pragma unroll
  for (int i = 0; i < Config::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;

  if (plan.tiles > 0) {
    ptx::wait(shared.k_full, 0);
    if (plan.key_count < params.key_count && plan.key_count < plan.first_key + Config::kKeys) {
      ptx::wait(shared.v_full, 0);
      clear_tail(shared, plan.key_count - plan.first_key);
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
    // The product for dQ takes 64 columns of k from the first key on, and kSharedQueries rows of dS.
    const auto start_dq = [&](float(&dq)[Config::kSharedQueries / 2], int buffer) {
      const int chunk = Config::kChunks == 1 ? 0 : consumer;
      const int row = Config::kChunks == 1 ? consumer * Config::kSharedQueries : 0;
      Operands::template start_dq<T>(dq, RowMajor(Operands::address(shared.k[chunk])),
                                     RowMajor(Operands::address(shared.ds[buffer][0][row])));
    };
    const auto exponentiate = [&](float(&scores)[kQueries / 2], int stage) {
      const int pair = 2 * (ptx::thread_in_warpgroup() % 4);
      const float* lse = &shared.rows[stage][0][pair];
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[4 * j + i] = exp2_fast(fmaf(scores[4 * j + i], params.scale_log2, i % 2 ? -two.y : -two.x));
      }
      const int first_query = walk.tile * kQueries;
      if (first_query < plan.full_begin || first_query + kQueries > plan.full_end)
        hide(scores, visibility_of(params, plan.key_count), params.query_count, first_key(), first_query + pair);
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
    exponentiate(scores, 0);

    // Each round begins with P^T and dP^T of its queries and ends with those of the next. No product runs on from round
    // to round: the assembler would wait for every single one. For the same reason the last round is like the others;
    // it starts the next one's products on whatever is there.
    const int steps = plan.tiles * params.group;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2;
      std::uint32_t weights[kQueries / 4], ds[kQueries / 4];
      pack_operand<T>(weights, scores);
      const auto start_dv = [&] {
        Operands::template start_sums<T>(dv, weights, Columns(Operands::address(shared.dout[stage])));
      };
      if constexpr (Config::kEarlyValues) start_dv();
      const int thread = ptx::thread_in_warpgroup();
      const float* delta = &shared.rows[stage][1][2 * (thread % 4)];
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * j + 2 * i;
          ds[2 * j + i] = pack<T>(scores[at] * (dp[at] - two.x), scores[at + 1] * (dp[at + 1] - two.y));
        }
      }
      // Where this lane's rows of dS go: 16-byte pieces in the 128-byte swizzle.
      const std::uint32_t ds_to = Operands::address(shared.ds[stage][consumer]) +
                                  (8 * (thread % 32 / 16) + thread % 8) * 128 +
                                  (((2 * (thread / 32) + thread / 8 % 2) ^ (thread % 8)) << 4);
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) ptx::store_transposed(ds_to + i * 16 * 128, ds + 4 * i);
      ptx::fence_async_proxy();
      if constexpr (!Config::kEarlyValues) start_dv();
      Operands::template start_sums<T>(dk, ds, Columns(Operands::address(shared.q[stage])));
      walk.advance(plan);

      // Fresh ones: old values would count as read by the products, and keep their registers until then.
      float next_scores[kQueries / 2], next_dp[kQueries / 2], dq[Config::kSharedQueries / 2];
      const int next = (step + 1) % 2, parity = (step + 1) / 2 % 2;
      const bool more = step + 1 < steps;
      if (more) ptx::wait(shared.q_full[next], parity);
      start_scores(next_scores, next);
      ptx::barrier_sync(1, 256);  // dS is whole
      ptx::wgmma_wait<1>();       // dV and dK: frees the registers of P^T and dS^T
      ptx::pin_registers(dv);
      ptx::pin_registers(dk);
      release(shared.dout_empty[stage]);
      ptx::arrive(shared.q_empty[stage]);  // every thread: each has read the rows
      start_dq(dq, stage);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(next_scores);
      ptx::pin_registers(dq);
      stage_dq(shared, dq, consumer, step);
      // Here and not above: its loop keeps the assembler from holding the registers of dQ and of dP at the same time.
      if (more) ptx::wait(shared.dout_full[next], parity);
      start_dp(next_dp, next);
      exponentiate(next_scores, next);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(next_dp);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) scores[i] = next_scores[i], dp[i] = next_dp[i];
    }
  }
  store_keys<T, Config>(params.dk, params.dk_stride, plan, first_key(), params.key_count, params.dim, dk, params.scale);
  store_keys<T, Config>(params.dv, params.dv_stride, plan, first_key(), params.key_count, params.dim_v, dv, 1.0f);
}

template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 8;
    ptx::init_barrier(shared.k_full, 1);
    ptx::init_barrier(shared.v_full, 1);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::init_barrier(shared.q_full[stage], 1);
      ptx::init_barrier(shared.dout_full[stage], 1);
      ptx::init_barrier(shared.q_empty[stage], 32 * kConsumerWarps);
      ptx::init_barrier(shared.dout_empty[stage], kConsumerWarps);
    }
    for (int consumer = 0; consumer < 2; ++consumer) {
      ptx::init_barrier(shared.dq_full[consumer], ptx::kWarpgroupThreads);
      ptx::init_barrier(shared.dq_empty[consumer], 1);
    }
    ptx::publish_barriers();
    // Blocks that wait for others must know that those have started: they take their work in the order they start in.
    const int block = Config::kOrdered ? static_cast<int>(atomicAdd(params.order, 1u)) : static_cast<int>(blockIdx.x);
    shared.plan = plan_keys<Config>(params, block);
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
