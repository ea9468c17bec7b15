// Barriers in shared memory that count arrivals and bytes of bulk copies (PTX ISA, "mbarrier").
#pragma once

#include <cstdint>
#include <cuda/ptx>

namespace adaattn::cuda::ptx {

using Barrier = std::uint64_t;

__device__ __forceinline__ void init_barrier(Barrier& barrier, int arrivals) {
  ::cuda::ptx::mbarrier_init(&barrier, arrivals);
}
// After the last init_barrier and before other threads or the copy engine use one.
__device__ __forceinline__ void publish_barriers() {
  ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
}
__device__ __forceinline__ void arrive(Barrier& barrier) { ::cuda::ptx::mbarrier_arrive(&barrier); }
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, std::uint32_t bytes) {
  ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta, ::cuda::ptx::space_shared,
                                         &barrier, bytes);
}
// Until the phase of this parity has completed.
__device__ __forceinline__ void wait(Barrier& barrier, std::uint32_t parity) {
  while (!::cuda::ptx::mbarrier_try_wait_parity(&barrier, parity)) {
  }
}

// Whether it has completed by now.
__device__ __forceinline__ bool has_completed(Barrier& barrier, std::uint32_t parity) {
  return ::cuda::ptx::mbarrier_test_wait_parity(&barrier, parity);
}

// The place of a producer or a consumer in a ring of kStages buffers.
template <int kStages>
struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace adaattn::cuda::ptx
