// Matrix products of one warp (PTX ISA, "Warp-level matrix instructions", mma.m16n8k16): a thin wrapper.
//
// d[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4 and c = 2 (lane % 4), a lane holds of d the rows g (entries 0, 1)
// and g + 8 (2, 3), columns c and c + 1; of a, two elements a register, the rows g, g + 8, g, g + 8 at columns c, c, c
// + 8, c + 8 on; of b the rows c and c + 8 on of column g. So an accumulator, rounded two by two, is the next product's
// a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace adaattn::cuda::ptx {

template <typename T>
__device__ __forceinline__ void multiply_add(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace adaattn::cuda::ptx
