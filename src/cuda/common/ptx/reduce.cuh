// Matrices from registers to shared memory, and sums into global memory.
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

// to[0..3] += values, to in global memory on 16 bytes; each element atomically, in no order.
__device__ __forceinline__ void add_to_global(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

}  // namespace adaattn::cuda::ptx
