// Where a consumer adds its part of dQ: to FP32 sums in global memory, in the order of its registers.
#pragma once

#include <cuda/atomic>

#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/schedule.cuh"

namespace adaattn::cuda::sm90 {

// The sums of one tile and consumer: [register / 4][thread][register % 4]. So each warp adds 512 bytes in a row.
template <typename Config>
class QueryGradient {
 public:
  static constexpr int kRegisters = Config::kSharedQueries / 2;

  __device__ __forceinline__ QueryGradient(const BackwardParams& params, const KeyPlan& plan, int consumer)
      : params_(params), plan_(plan), consumer_(consumer) {}

  // The tile that the following add() adds to.
  __device__ __forceinline__ void next(int index, int query_tile) {
    index_ = index;
    query_tile_ = query_tile;
  }

  __device__ __forceinline__ void add(const float (&dq)[kRegisters]) {
    if constexpr (Config::kOrdered) {
      finish();
      added_ = params_.order + 1 + 2 * std::int64_t{index_} + consumer_;
      const unsigned turn = turn_of<Config>(params_, plan_, query_tile_);
      if (threadIdx.x % 128 == 0)
        while (::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*added_).load(::cuda::memory_order_acquire) !=
               turn) {
        }
      ptx::barrier_sync(2 + consumer_, ptx::kWarpgroupThreads);
    }
    float* to =
        params_.dq + (2 * std::int64_t{index_} + consumer_) * (128 * kRegisters) + 4 * ptx::thread_in_warpgroup();
#pragma unroll
    for (int i = 0; i < kRegisters / 4; ++i)
      ptx::add_to_global(to + 512 * i, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  }

  // In a deterministic order: lets the next block add to the tile added to last. Done as late as the next add(), when
  // the sums have long arrived.
  __device__ __forceinline__ void finish() {
    if (!Config::kOrdered || added_ == nullptr) return;
    __threadfence();
    ptx::barrier_sync(2 + consumer_, ptx::kWarpgroupThreads);
    if (threadIdx.x % 128 == 0)
      ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>(*added_).fetch_add(1, ::cuda::memory_order_release);
    added_ = nullptr;
  }

 private:
  const BackwardParams& params_;
  const KeyPlan& plan_;
  const int consumer_;
  int index_ = 0;
  int query_tile_ = 0;
  unsigned* added_ = nullptr;
};

}  // namespace adaattn::cuda::sm90
