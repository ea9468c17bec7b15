// Bulk tensor copies between global and shared memory (PTX ISA, "cp.async.bulk.tensor").
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cuda/ptx>

#include "cuda/common/ptx/mbarrier.cuh"

namespace adaattn::cuda::ptx {

// Copies the box of a [batch, head, token, dim] tensor map that starts there; what lies outside the tensor becomes 0.
// Completes on the barrier, which must expect the bytes of a whole box.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int dim, int token,
                                         int head, int batch) {
  const std::int32_t at[4] = {dim, token, head, batch};
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, to, &map, at, &barrier);
}

// Copies a box to where it starts in a [batch, head, token, dim] tensor; nothing is written outside the tensor. Belongs
// to this thread's open group of copies (commit_stores in reduce.cuh).
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int dim, int token, int head,
                                          int batch) {
  const std::int32_t at[4] = {dim, token, head, batch};
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_global, ::cuda::ptx::space_shared, &map, at, from);
}

// load_box of a [batch, key head, token, head in its group, dim] map.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int dim, int head_in_group,
                                         int token, int key_head, int batch) {
  const std::int32_t at[5] = {dim, head_in_group, token, key_head, batch};
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, to, &map, at, &barrier);
}

// The same of a [row, byte] map.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int byte, int row) {
  const std::int32_t at[2] = {byte, row};
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, to, &map, at, &barrier);
}

// Copies bytes, a multiple of 16, between addresses on 16 bytes.
__device__ __forceinline__ void load_bytes(void* to, const void* from, std::uint32_t bytes, Barrier& barrier) {
  ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, to, from, bytes, &barrier);
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<std::uint64_t>(&map)) : "memory");
}

// Orders ordinary writes to shared memory before later reads of it by the tensor cores and the copy engine.
__device__ __forceinline__ void fence_async_proxy() { ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared); }

// The same for memory of any kind, and for what the copy engine wrote.
__device__ __forceinline__ void fence_async_proxy_everywhere() { ::cuda::ptx::fence_proxy_async(); }

}  // namespace adaattn::cuda::ptx
