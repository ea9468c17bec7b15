// How the two consumers of kernel.cuh hand each other dS, and take turns at the tensor cores.
//
// Each makes its part of dQ of the dS of both. At once: they meet when both have written it, and so compute and
// multiply at the same time. Late (Config::kLate): a step multiplies the dS of the step before, which has long been
// there, so that they may be up to a step apart and one's arithmetic hides behind the other's products. That takes two
// more barriers a buffer and, at the end, one product that nothing hides.
#pragma once

#include "cuda/sm90/backward/consumer.cuh"

namespace adaattn::cuda::sm90 {

template <typename Config>
struct Handover {
  static constexpr int kTurnBarrier = 2;  // and the next: named barriers
  BackwardShared<Config>& shared;
  int consumer;

  // Before this step's dS is written: until both have multiplied what was in its buffer.
  __device__ __forceinline__ void await_buffer(int step) const {
    if constexpr (Config::kLate) ptx::wait(shared.ds_empty[step % 2], step / 2 % 2 ^ 1);
  }
  // This step's dS is written, and fenced for the tensor cores.
  __device__ __forceinline__ void hand_over(int step) const {
    if constexpr (Config::kLate) release(shared.ds_full[step % 2]);
  }
  // Until both have written the dS of this step, if there is one.
  __device__ __forceinline__ void await_whole(int step) const {
    if constexpr (!Config::kLate)
      ptx::barrier_sync(kConsumerBarrier, kConsumerThreads);
    else if (step >= 0)
      ptx::wait(shared.ds_full[step % 2], step / 2 % 2);
  }
  // This consumer has multiplied the dS of this step.
  __device__ __forceinline__ void give_back(int step) const {
    if constexpr (Config::kLate) release(shared.ds_empty[step % 2]);
  }

  // Turns begin with consumer 0. Each of its turns, but no last one of consumer 1, is followed by another.
  __device__ __forceinline__ void give_first_turn() const {
    if (Config::kTurns && consumer == 1) ptx::barrier_arrive(kTurnBarrier, kConsumerThreads);
  }
  __device__ __forceinline__ void await_turn() const {
    if constexpr (Config::kTurns) ptx::barrier_sync(kTurnBarrier + consumer, kConsumerThreads);
  }
  __device__ __forceinline__ void pass_turn(bool more) const {
    if (Config::kTurns && (more || consumer == 0)) ptx::barrier_arrive(kTurnBarrier + (consumer ^ 1), kConsumerThreads);
  }
};

}  // namespace adaattn::cuda::sm90
