// What a consumer, a warpgroup with 64 keys of its own, does in both backward kernels.
#pragma once

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_rs.cuh"
#include "cuda/common/ptx/wgmma_ss.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/schedule.cuh"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {

constexpr int kConsumerThreads = 256, kConsumerWarps = kConsumerThreads / 32, kConsumerBarrier = 1;

// A warp's arrival, once all of it is there.
__device__ __forceinline__ void release(ptx::Barrier& barrier) {
  __syncwarp();
  if (ptx::is_elected()) ptx::arrive(barrier);
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
  template <typename T, int kCount>
  static __device__ __forceinline__ void start_dq(float (&dq)[kCount], RowMajor k, RowMajor ds) {
    ptx::pin_registers(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kKeys / 16; ++i)
      ptx::wgmma_transposed_ss<T>(dq, k.at(i * 16 * 128), ds.at(i / 4 * Config::kQueries * 128 + i % 4 * 32), i > 0);
    ptx::wgmma_commit();
  }
};

// Keys and values at and after the key length may be anything, and 0 * NaN is NaN: the consumers write zeros over them.
template <typename Config, typename Shared>
__device__ __forceinline__ void clear_tail(Shared& shared, int first) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int i = first * 8 + static_cast<int>(threadIdx.x) - 128; i < Config::kKeys * 8; i += kConsumerThreads)
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      reinterpret_cast<uint4*>(shared.k[chunk])[i] = zero;
      reinterpret_cast<uint4*>(shared.v[chunk])[i] = zero;
    }
  ptx::fence_async_proxy();
  ptx::barrier_sync(kConsumerBarrier, kConsumerThreads);
}

// Where a lane's numbers lie in shared memory. Kept over the loop: made anew they would take forty instructions of each
// step.
template <typename Config, typename Shared>
struct LanePlaces {
  std::uint32_t rows;  // lse of its first two queries
  std::uint32_t ds;    // its 16-byte piece of dS in the 128-byte swizzle

  __device__ __forceinline__ LanePlaces(Shared& shared, int consumer) {
    const unsigned thread = static_cast<unsigned>(ptx::thread_in_warpgroup());
    rows = BackwardOperands<Config>::address(&shared.rows[0][0][2 * (thread % 4)]);
    ds = BackwardOperands<Config>::address(shared.ds[0][consumer]) + (8 * (thread % 32 / 16) + thread % 8) * 128 +
         (((2 * (thread / 32) + thread / 8 % 2) ^ (thread % 8)) << 4);
  }
  // Two queries' lse / ln 2 (which = 0) or delta (1), the lane's j-th pair.
  __device__ __forceinline__ float2 row_pair(int stage, int which, int j) const {
    const std::uint32_t from = rows + static_cast<std::uint32_t>(stage) * sizeof(Shared::rows[0]);
    float2 two;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(two.x), "=f"(two.y)
                 : "r"(from + 4 * (which * Config::kQueries + 8 * j))
                 : "memory");
    return two;
  }
  __device__ __forceinline__ std::uint32_t ds_buffer(int buffer) const {
    return ds + static_cast<std::uint32_t>(buffer) * sizeof(Shared::ds[0]);
  }
};

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

// The upper of the two keys whose scores a thread holds.
__device__ __forceinline__ int first_key_of(const KeyPlan& plan, int consumer) {
  const int thread = ptx::thread_in_warpgroup();
  return plan.first_key + 64 * consumer + 16 * (thread / 32) + thread % 32 / 4;
}

// Whether some key of the block is hidden from some query of the tile.
template <typename Config>
__device__ __forceinline__ bool hides(const KeyPlan& plan, int tile) {
  return tile * Config::kQueries < plan.full_begin || (tile + 1) * Config::kQueries > plan.full_end;
}

// Scores become probabilities of the tile's queries.
template <typename Config, typename Places>
__device__ __forceinline__ void exponentiate(float (&scores)[Config::kQueries / 2], const BackwardParams& params,
                                             const KeyPlan& plan, const Places& places, int consumer, int stage,
                                             int tile) {
#pragma unroll
  for (int j = 0; j < Config::kQueries / 8; ++j) {
    const float2 two = places.row_pair(stage, 0, j);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scores[4 * j + i] = exp2_fast(fmaf(scores[4 * j + i], params.scale_log2, i % 2 ? -two.y : -two.x));
  }
  if (hides<Config>(plan, tile))
    hide(scores, visibility_of(params, plan.key_count), params.query_count, first_key_of(plan, consumer),
         tile * Config::kQueries + 2 * (ptx::thread_in_warpgroup() % 4));
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
__device__ __forceinline__ void store_keys(const BackwardParams& params, const KeyPlan& plan, int consumer,
                                           const float (&dk)[Config::kDim / 2], const float (&dv)[Config::kDim / 2]) {
  const int key = first_key_of(plan, consumer);
  store_keys<T, Config>(params.dk, params.dk_stride, plan, key, params.key_count, params.dim, dk, params.scale);
  store_keys<T, Config>(params.dv, params.dv_stride, plan, key, params.key_count, params.dim_v, dv, 1.0f);
}

}  // namespace adaattn::cuda::sm90
