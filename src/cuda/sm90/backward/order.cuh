// The deterministic order in which blocks of threads add to dQ: each place in it counts how many have added.
//
// A block waits only for blocks that started before it: they take their work in the order in which they start, and add
// in that order, too. So none can wait for one that is not running, however many run at a time.
#pragma once

#include <cuda/atomic>

#include "cuda/common/ptx/reduce.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/sm90/backward/config.h"

namespace adaattn::cuda::sm90 {

using OrderCounter = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;

// Which block of the schedule this block of threads works on.
template <typename Config>
__device__ __forceinline__ int take_place(const BackwardParams& params) {
  return Config::kOrdered ? static_cast<int>(atomicAdd(params.order, 1u)) : static_cast<int>(blockIdx.x);
}

// Until so many blocks have added to this part of the sums. For the thread that adds next.
__device__ __forceinline__ void await_turn(const BackwardParams& params, int part, int turn) {
  while (OrderCounter(params.order[1 + part]).load(::cuda::memory_order_acquire) != static_cast<unsigned>(turn)) {
  }
  ptx::fence_async_proxy_everywhere();  // the copy engine adds, and what it did before it must see
}

// What this thread has added is there. The end of a copy orders it before what its thread does next; the release before
// what the next block does.
__device__ __forceinline__ void pass_turn(const BackwardParams& params, int part) {
  ptx::wait_copies_done();
  OrderCounter(params.order[1 + part]).fetch_add(1, ::cuda::memory_order_release);
}

}  // namespace adaattn::cuda::sm90
