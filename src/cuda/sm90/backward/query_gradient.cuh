// The way of dQ: from registers through shared memory to FP32 sums in global memory, and from there, rounded, to dq.
#pragma once

#include <cuda/atomic>

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/consumer.cuh"
#include "cuda/sm90/backward/schedule.cuh"
#include "cuda/sm90/registers.cuh"

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

// Once a thread has added all that it will: tells the block whether it was the key head's last.
template <typename Config, typename Shared>
__device__ __forceinline__ void report_added(const BackwardParams& params, Shared& shared) {
  if (params.finished == nullptr) return;
  ptx::wait_copies_done();
  ptx::fence_async_proxy_everywhere();
  __threadfence();
  using Counter = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;
  const int head = shared.plan.batch * (params.heads / params.group) + shared.plan.key_head;
  const unsigned before = Counter(params.finished[head]).fetch_add(1, ::cuda::memory_order_acq_rel);
  if (before + 1 == static_cast<unsigned>(Config::kAdders * params.key_tiles)) shared.last_adder = true;
  ptx::arrive(shared.all_added);
}

// One thread adds what one consumer stages. Consumers never wait for a block's turn in a deterministic order, only for
// the place of the tile before.
template <typename Config>
__device__ __forceinline__ void add_dq(const BackwardParams& params, BackwardShared<Config>& shared, int consumer) {
  constexpr int kElements = 64 * Config::kSharedQueries;
  using Counter = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;
  const KeyPlan& plan = shared.plan;
  QueryWalk walk(params, plan);
  const int steps = plan.tiles * params.group;
  for (int step = 0; step < steps; ++step, walk.advance(plan)) {
    const std::int64_t part = 2 * std::int64_t{tile_index(params, plan, walk)} + consumer;
    ptx::wait(shared.dq_full[consumer], step % 2);
    if constexpr (Config::kOrdered) {
      const unsigned turn = turn_of<Config>(params, plan, walk.tile);
      while (Counter(params.order[1 + part]).load(::cuda::memory_order_acquire) != turn) {
      }
    }
    float* const to = params.sums + part * kElements;
    if (params.adds)
      ptx::add_to_global(to, shared.dq[consumer], kElements * sizeof(float));
    else
      ptx::copy_to_global(to, shared.dq[consumer], kElements * sizeof(float));
    ptx::wait_sources_read();
    ptx::arrive(shared.dq_empty[consumer]);
    if constexpr (Config::kOrdered) {
      ptx::wait_copies_done();
      ptx::fence_async_proxy_everywhere();
      __threadfence();
      Counter(params.order[1 + part]).fetch_add(1, ::cuda::memory_order_release);
    }
  }
  ptx::wait_sources_read();  // shared memory is given back when the block ends
  report_added<Config>(params, shared);
}

// A thread's part of the rounding of one tile: dq = scale * sums of 16 columns of two queries.
template <typename T, typename Config>
struct DqPiece {
  static constexpr int kEights = Config::kSharedQueries / 8, kPerTile = 2 * kEights * 16;
  float4 parts[8];  // of each of 8 neighbouring columns, and 8 further on: two queries

  // The index within a tile: consumer, 8 queries, warp, column of the quad; see stage_dq and ptx/wgmma.cuh.
  static __device__ __forceinline__ int column(int piece) { return piece % 4; }
  static __device__ __forceinline__ int warp(int piece) { return piece / 4 % 4; }
  static __device__ __forceinline__ int eight(int piece) { return piece / 16 % kEights; }
  static __device__ __forceinline__ int consumer(int piece) { return piece / 16 / kEights; }

  // The tile of all heads' tiles. Past the L1 cache, which knows nothing of what others added.
  __device__ __forceinline__ void load(const BackwardParams& params, int tile, int piece) {
    const float4* from = reinterpret_cast<const float4*>(params.sums) +
                         ((2 * std::int64_t{tile} + consumer(piece)) * kEights + eight(piece)) * 128 +
                         32 * warp(piece) + column(piece);
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[i] = __ldcg(from + 4 * i);
  }

  __device__ __forceinline__ void store(const BackwardParams& params, int tile, int piece) const {
    const int head = tile / params.query_tiles, b = head / params.heads, h = head % params.heads;
    const int first_column = 64 * (Config::kChunks == 1 ? 0 : consumer(piece)) + 16 * warp(piece);
    const int first_query = tile % params.query_tiles * Config::kQueries + 8 * eight(piece) + 2 * column(piece) +
                            (Config::kChunks == 1 ? consumer(piece) * Config::kSharedQueries : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first_query + i >= params.query_count) break;
      T* to = static_cast<T*>(params.dq) + b * params.dq_stride[0] + h * params.dq_stride[1] +
              (first_query + i) * params.dq_stride[2] + first_column;
      std::uint32_t words[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 &a = parts[2 * j], &c = parts[2 * j + 1];
        words[j] = pack<T>((i ? a.y : a.x) * params.scale, (i ? c.y : c.x) * params.scale);
        words[4 + j] = pack<T>((i ? a.w : a.z) * params.scale, (i ? c.w : c.z) * params.scale);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (first_column + 8 * half < params.dim)
          reinterpret_cast<uint4*>(to)[half] =
              make_uint4(words[4 * half], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3]);
    }
  }
};

// Where the block was the key head's last to add: its consumers round dQ of the group, two tiles at a time. Their sums
// are mostly in the L2 cache still, and other blocks of threads compute meanwhile.
template <typename T, typename Config, typename Shared>
__device__ __forceinline__ void finish_dq(const BackwardParams& params, Shared& shared, const KeyPlan& plan) {
  if (params.finished == nullptr) return;
  ptx::wait(shared.all_added, 0);
  if (!shared.last_adder) return;
  __threadfence();
  using Piece = DqPiece<T, Config>;
  const int piece = static_cast<int>(threadIdx.x) - 128;
  if (piece >= Piece::kPerTile) return;
  const int begin = (plan.batch * params.heads + plan.key_head * params.group) * params.query_tiles;
  const int end = begin + params.group * params.query_tiles;
#pragma unroll 1
  for (int tile = begin; tile < end; tile += 2) {
    Piece one, two;
    one.load(params, tile, piece);
    if (tile + 1 < end) two.load(params, tile + 1, piece);
    one.store(params, tile, piece);
    if (tile + 1 < end) two.store(params, tile + 1, piece);
  }
}

}  // namespace adaattn::cuda::sm90
