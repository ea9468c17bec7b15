// Matrices from registers to shared memory, and sums from there into global memory.
#pragma once

#include <cstdint>

namespace adaattn::cuda::ptx {

// Four 8 x 8 matrices of 16-bit elements, transposed on the way: each lane names the 16 bytes of one row of the result,
// lanes 8 i to 8 i + 7 those of matrix i, which lies in words[i] as an accumulator's corner would.
__device__ __forceinline__ void store_transposed(std::uint32_t shared_address, const std::uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The same as they are: each lane names the 16 bytes of one row of matrix lane / 8.
__device__ __forceinline__ void store_matrices(std::uint32_t shared_address, const std::uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// to[i] += from[i] for the float32 elements of so many bytes, by the copy engine: to in global memory, from in shared
// memory, both on 16 bytes; each element atomically, in no order. Closes a group of copies.
__device__ __forceinline__ void add_to_global(float* to, const float* from, std::uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(to),
               "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(from))), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// to[i] = from[i] in the same way.
__device__ __forceinline__ void copy_to_global(float* to, const float* from, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(to),
               "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(from))), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// Closes a group of this thread's copies to global memory.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Until this thread's groups have read their sources, or are done altogether.
__device__ __forceinline__ void wait_sources_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ __forceinline__ void wait_copies_done() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

}  // namespace adaattn::cuda::ptx
