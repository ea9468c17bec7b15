// What warpgroups do besides products: trade registers, and meet at named barriers.
#pragma once

#include <cstdint>

namespace adaattn::cuda::ptx {

constexpr int kWarpgroupThreads = 128;

// Read anew wherever it is needed, so that nothing derived from it stays in a register over the loop.
__device__ __forceinline__ int thread_in_warpgroup() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % kWarpgroupThreads;
}

// True in one lane of a whole warp.
__device__ __forceinline__ bool is_elected() {
  std::uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Barrier 0 is __syncthreads'. threads counts all that arrive or sync.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace adaattn::cuda::ptx
