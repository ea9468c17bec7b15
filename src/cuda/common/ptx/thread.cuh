// The thread's index, read anew.
#pragma once

namespace adaattn::cuda::ptx {

// threadIdx.x in a form that the compiler does not keep, nor what is computed from it, in registers from use to use.
__device__ __forceinline__ unsigned fresh_thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

}  // namespace adaattn::cuda::ptx
