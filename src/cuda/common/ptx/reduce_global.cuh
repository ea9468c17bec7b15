// Sums in global memory that many threads add to.
#pragma once

namespace adaattn::cuda::ptx {

// *to += value, atomically, in no order.
__device__ __forceinline__ void add_to_global(float* to, float value) {
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)), "f"(value) : "memory");
}

// A counter by which blocks of threads tell each other how far they are.
__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.global.acquire.gpu.u32 %0, [%1];\n" : "=r"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(unsigned* to, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}

}  // namespace adaattn::cuda::ptx
