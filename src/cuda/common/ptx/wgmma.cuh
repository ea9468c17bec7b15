// Warpgroup matrix products of Hopper (PTX ISA, "Asynchronous warpgroup level matrix instructions"): thin wrappers.
//
// One call multiplies 64 rows by 16: d[64, n] += a[64, 16] b[16, n]. Accumulator layout: thread t of the warpgroup
// holds rows 16 (t / 32) + t % 32 / 4 (entries 4 j, 4 j + 1) and 8 below (4 j + 2, 4 j + 3), columns 8 j + 2 (t % 4) +
// {0, 1}.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace adaattn::cuda::ptx {

// The element type's name in the instruction.
template <typename T>
struct WgmmaType;
template <>
struct WgmmaType<__nv_bfloat16> {
  static constexpr char kName[] = "bf16";
};
template <>
struct WgmmaType<__half> {
  static constexpr char kName[] = "f16";
};

// Before the first product that reads registers written by ordinary instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most kPending groups run on.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across this point.
template <typename Register, int kCount>
__device__ __forceinline__ void pin_registers(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if constexpr (std::is_same_v<Register, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
}

// Descriptor of an operand in shared memory with the 128-byte swizzle: columns in chunks of 64 elements, a chunk being
// rows of 128 bytes, eight rows (1,024 bytes) a swizzle atom. kChunkBytes, the distance of two chunks, counts only
// where the product's n runs along the columns ("transposed" b).
template <int kChunkBytes>
struct WgmmaOperand {
  std::uint32_t low;  // the half that holds the address

  // The shuffle tells the compiler that the whole warp has one address: it then stays in uniform registers, where the
  // products want it, and so do the sums of at().
  __device__ __forceinline__ explicit WgmmaOperand(std::uint32_t shared_address)
      : low(__shfl_sync(0xFFFFFFFFu, (shared_address & 0x3FFFF) >> 4 | (kChunkBytes >> 4) << 16, 0)) {}

  // This many bytes further on.
  __device__ __forceinline__ std::uint64_t at(std::uint32_t bytes) const {
    constexpr std::uint64_t kSwizzle128 = 1ull << 62, kAtomBytes = 1024;
    return kSwizzle128 | (kAtomBytes >> 4) << 32 | (low + (bytes >> 4));
  }
};

}  // namespace adaattn::cuda::ptx
