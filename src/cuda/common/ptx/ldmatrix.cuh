// Operands of warp-level products from shared memory.
#pragma once

#include <cstdint>

namespace adaattn::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* object) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(object));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 name the rows (16 bytes each) of matrix i, which comes
// into to[i]: the lane's two elements are columns 2 (lane % 4) and one on of row lane / 4.
__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], std::uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Each matrix transposed: the lane's two elements are rows 2 (lane % 4) and one on of column lane / 4.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&to)[4], std::uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// One register to shared memory.
__device__ __forceinline__ void store_word(std::uint32_t to, std::uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to), "r"(word) : "memory");
}

}  // namespace adaattn::cuda::ptx
