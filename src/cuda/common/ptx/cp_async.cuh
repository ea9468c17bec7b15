// Copies from global to shared memory that run while the thread goes on (PTX ISA, "cp.async").
#pragma once

#include <cstdint>

namespace adaattn::cuda::ptx {

// 16 bytes, both sides on 16 bytes; zeros, with nothing read, if they do not exist.
__device__ __forceinline__ void copy_16_bytes(std::uint32_t to, const void* from, bool exist) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(exist ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most kPending of this thread's groups run on. Other threads see the copies after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace adaattn::cuda::ptx
