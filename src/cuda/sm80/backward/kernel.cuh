// Exact gradients for sm_80 and later: recomputes the probabilities from lse (FlashAttention-2, arXiv 2307.08691,
// algorithm 2).
//
// A block of threads keeps a tile of keys and values in shared memory, dK and dV in registers, and walks over the
// queries that see them. Per tile of queries:
//   S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta), dV += P^T dO, dK += dS^T Q,
//   dQ += dS K
// P^T and dS^T pass through shared memory, so that each product can be shared among the warps as suits it best. dQ is
// added to float32 sums in global memory. The scale on dQ and dK is left to the end.
#pragma once

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/common/ptx/reduce_global.cuh"
#include "cuda/common/ptx/thread.cuh"
#include "cuda/sm80/backward/config.h"
#include "cuda/sm80/backward/products.cuh"
#include "cuda/sm80/backward/schedule.cuh"
#include "cuda/sm80/mask.cuh"
#include "cuda/sm80/store_rows.cuh"
#include "cuda/sm80/tiles.cuh"

namespace adaattn::cuda::sm80 {

template <typename T>
__device__ __forceinline__ const T* head_of(const MatrixView& view, int batch, int head) {
  return static_cast<const T*>(view.data) + batch * view.stride[0] + head * view.stride[1];
}

// Starts the copies of one tile of queries, and closes their group.
template <typename T, typename Config>
__device__ __forceinline__ void copy_queries(const BackwardParams& params, const KeyPlan& plan, QueryPlace place,
                                             typename BackwardShared<Config>::Stage& stage) {
  constexpr int kQueries = Config::kQueries, kDim = Config::kDim, kThreads = Config::kThreads;
  const int first = place.tile * kQueries;
  copy_tile<kQueries, kDim, kThreads>(ptx::shared_address(stage.q), head_of<T>(params.q, plan.batch, place.head),
                                      params.q.stride[2], first, params.query_count, params.dim);
  copy_tile<kQueries, kDim, kThreads>(ptx::shared_address(stage.dout), head_of<T>(params.dout, plan.batch, place.head),
                                      params.dout.stride[2], first, params.query_count, params.dim_v);
  const unsigned thread = ptx::fresh_thread_index();
  if (thread < kQueries / 2)  // four numbers each
    ptx::copy_16_bytes(ptx::shared_address(stage.rows) + 16 * thread,
                       params.rows + index_of(params, plan, place) * 2 * kQueries + 4 * thread, true);
  if (thread == 0) stage.place = place;
  ptx::commit_copies();
}

// Scores to probabilities. lse: over ln 2, of the query of a lane's first column.
template <int kCount>
__device__ __forceinline__ void exponentiate(float (&scores)[kCount], float scale_log2, const float* lse) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scores[4 * j + i] = ptx::exp2_fast(fmaf(scores[4 * j + i], scale_log2, -lse[8 * j + i % 2]));
}

// The same with a mask tensor. first_key is this lane's upper row, first_query the query of its first column.
template <typename T, int kCount>
__device__ __forceinline__ void exponentiate_masked(float (&scores)[kCount], const BackwardParams& params,
                                                    const KeyPlan& plan, int head, int first_key, int first_query,
                                                    const float* lse) {
  constexpr float kLog2e = 1.4426950408889634f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int key = first_key + i / 2 % 2 * 8, column = 8 * (i / 4) + i % 2, query = first_query + column;
    const float term = key < plan.reach.key_count && query < params.query_count
                           ? mask_term<T>(params.mask, mask_offset(params.mask, plan.batch, head, query, key))
                           : -INFINITY;
    scores[i] =
        term == -INFINITY ? 0.0f : ptx::exp2_fast(fmaf(scores[i], params.scale_log2, fmaf(term, kLog2e, -lse[column])));
  }
}

// Probabilities of query and key pairs that do not see each other become 0.
template <int kCount>
__device__ __forceinline__ void hide(float (&p)[kCount], const Reach& reach, int first_key, int first_query) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Queries seeing = queries_of(reach, first_key + 8 * row);
    const int begin = seeing.begin - first_query, end = seeing.end - first_query;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int query = 8 * (i / 2) + i % 2;
      if (query < begin || query >= end) p[4 * (i / 2) + 2 * row + i % 2] = 0.0f;
    }
  }
}

// Rounds a warp's 16 rows by kCount / 2 columns to a tile of rows of kColumns elements; first_column is a multiple of
// their number. See tiles.cuh.
template <typename T, int kColumns, int kCount>
__device__ __forceinline__ void store_strip(std::uint32_t tile, const float (&values)[kCount], int first_row,
                                            int first_column) {
  const unsigned lane = ptx::fresh_thread_index() % 32, row = lane / 4;
  const std::uint32_t to = tile + (first_row + row) * kColumns * 2 + ((first_column / 8 ^ row) << 4) + lane % 4 * 4;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    ptx::store_word(to ^ (j << 4), ptx::pack<T>(values[4 * j], values[4 * j + 1]));
    ptx::store_word((to ^ (j << 4)) + 8 * kColumns * 2, ptx::pack<T>(values[4 * j + 2], values[4 * j + 3]));
  }
}

// Rounds a warp's rows of dK or dV and writes them.
template <typename T, int kCount>
__device__ __forceinline__ void store_keys(const MatrixView& gradient, const KeyPlan& plan, int first_key,
                                           int first_column, int key_count, int dim, const float (&sums)[2][kCount],
                                           float factor) {
#pragma unroll
  for (int strip = 0; strip < 2; ++strip)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int key = first_key + 16 * strip + 8 * row;
      T* to = static_cast<T*>(gradient.data) + plan.batch * gradient.stride[0] + plan.key_head * gradient.stride[1] +
              key * gradient.stride[2] + first_column;
      store_row(to, sums[strip], row, factor, key < key_count, dim - first_column);
    }
}

// Adds a warp's tile of dQ; in the order of the blocks' turns if there is one.
template <typename Config>
__device__ __forceinline__ void add_dq(const BackwardParams& params, const KeyPlan& plan, QueryPlace place,
                                       const float (&dq)[2][16]) {
  const std::int64_t tile = index_of(params, plan, place);
  if (params.order != nullptr) {
    if (threadIdx.x == 0) {
      const unsigned turn = turn_of<Config>(plan, place.tile);
      while (ptx::load_acquire(params.order + 1 + tile) != turn) {
      }
    }
    __syncthreads();
  }
  float* to = params.dq + tile * Config::kWarps * 1024 + threadIdx.x / 32 * 1024 + threadIdx.x % 32;
#pragma unroll
  for (int strip = 0; strip < 2; ++strip)
#pragma unroll
    for (int i = 0; i < 16; ++i) ptx::add_to_global(to + (16 * strip + i) * 32, dq[strip][i]);
  if (params.order != nullptr) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ptx::add_release(params.order + 1 + tile, 1);
  }
}

template <typename T, typename Config, bool kMasked>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kDim = Config::kDim, kQueries = Config::kQueries, kKeys = Config::kKeys, kRow = Config::kRow;
  constexpr int kScoreStrips = Config::kScoreStrips;
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Config>*>(memory);
  const KeyPlan& plan = shared.plan;  // stays in shared memory: registers are scarce
  if (threadIdx.x == 0) {
    // Blocks that wait for others must know that those have started: they take their work in the order they start in.
    const int block =
        params.order != nullptr ? static_cast<int>(atomicAdd(params.order, 1u)) : static_cast<int>(blockIdx.x);
    shared.plan = plan_keys<Config>(params, block);
  }
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // Which strips of 16 keys and which columns are the warp's: of S^T and dP^T, and of dK and dV.
  const int score_strip = warp % 4 * kScoreStrips, half = warp / 4;
  const int key_strip = warp % Config::kKeyGroups * 2, part = warp / Config::kKeyGroups;
  float dk[2][Config::kDimColumns / 2], dv[2][Config::kDimColumns / 2];
  clear(dk);
  clear(dv);

  const int steps = plan.tiles * params.group;
  if (steps > 0) {
    copy_tile<kKeys, kDim, Config::kThreads>(ptx::shared_address(shared.k),
                                             head_of<T>(params.k, plan.batch, plan.key_head), params.k.stride[2],
                                             plan.first_key, plan.reach.key_count, params.dim);
    copy_tile<kKeys, kDim, Config::kThreads>(ptx::shared_address(shared.v),
                                             head_of<T>(params.v, plan.batch, plan.key_head), params.v.stride[2],
                                             plan.first_key, plan.reach.key_count, params.dim_v);
    copy_queries<T, Config>(params, plan, first_place(params, plan), shared.stages[0]);

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      auto& stage = shared.stages[step % 2];
      const std::uint32_t k = ptx::shared_address(shared.k), v = ptx::shared_address(shared.v);
      const std::uint32_t q = ptx::shared_address(stage.q), dout = ptx::shared_address(stage.dout);
      const std::uint32_t p = ptx::shared_address(shared.p), ds = ptx::shared_address(shared.ds);
      ptx::wait_copies<0>();
      __syncthreads();  // this tile is there, and the one before, p and ds have been read
      if (step + 1 < steps)
        copy_queries<T, Config>(params, plan, next_place(plan, stage.place), shared.stages[(step + 1) % 2]);

      {
        float scores[kScoreStrips][kQueries / 4], dp[kScoreStrips][kQueries / 4];
        const int pair = 2 * (lane % 4), column = half * Config::kQueryColumns;
        clear(scores);
        multiply<T, kDim>(scores, RowsOfLeft<kDim>{RowsFirst<kDim>(k, ptx::fresh_thread_index())}, score_strip,
                          RowsOfRight<kDim>{ColumnsFirst<kDim>(q)}, column / 16);
        const int first_query = stage.place.tile * kQueries;
        const bool whole = first_query >= plan.full_begin && first_query + kQueries <= plan.full_end;
#pragma unroll
        for (int strip = 0; strip < kScoreStrips; ++strip) {
          const int row = 16 * (score_strip + strip);
          const int first_key = plan.first_key + row + lane / 4;
          const float* lse = &stage.rows[0][column + pair];
          if constexpr (kMasked)
            exponentiate_masked<T>(scores[strip], params, plan, stage.place.head, first_key,
                                   first_query + column + pair, lse);
          else
            exponentiate(scores[strip], params.scale_log2, lse);
          if (!whole) hide(scores[strip], plan.reach, first_key, first_query + column + pair);
          store_strip<T, kRow>(p, scores[strip], row, column);
        }
        clear(dp);
        multiply<T, kDim>(dp, RowsOfLeft<kDim>{RowsFirst<kDim>(v, ptx::fresh_thread_index())}, score_strip,
                          RowsOfRight<kDim>{ColumnsFirst<kDim>(dout)}, column / 16);
        const float* delta = &stage.rows[1][column + pair];
#pragma unroll
        for (int strip = 0; strip < kScoreStrips; ++strip) {
#pragma unroll
          for (int i = 0; i < kQueries / 4; ++i)
            dp[strip][i] = scores[strip][i] * (dp[strip][i] - delta[8 * (i / 4) + i % 2]);
          store_strip<T, kRow>(ds, dp[strip], 16 * (score_strip + strip), column);
        }
      }
      __syncthreads();  // p and ds are whole

      multiply<T, kQueries>(dv, RowsOfLeft<kRow>{RowsFirst<kRow>(p)}, key_strip,
                            ColumnsOfRight<kDim>{RowsFirst<kDim>(dout)}, part * Config::kDimColumns / 16);
      multiply<T, kQueries>(dk, RowsOfLeft<kRow>{RowsFirst<kRow>(ds)}, key_strip,
                            ColumnsOfRight<kDim>{RowsFirst<kDim>(q)}, part * Config::kDimColumns / 16);
      float dq[2][16];
      clear(dq);
      multiply<T, kKeys>(dq, ColumnsOfLeft<kRow>{ColumnsFirst<kRow>(ds)}, warp % Config::kDqRowTiles * 2,
                         ColumnsOfRight<kDim>{RowsFirst<kDim>(k)}, warp / Config::kDqRowTiles * 2);
      add_dq<Config>(params, plan, stage.place, dq);
    }
  }
  const int first_key = plan.first_key + 16 * key_strip + lane / 4, first_column = part * Config::kDimColumns;
  store_keys<T>(params.dk, plan, first_key, first_column, params.key_count, params.dim, dk, params.scale);
  store_keys<T>(params.dv, plan, first_key, first_column, params.key_count, params.dim_v, dv, 1.0f);
}

}  // namespace adaattn::cuda::sm80
