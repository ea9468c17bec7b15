// Warpgroup products of e4m3 bytes with float16 sums (PTX ISA, "wgmma.mma_async", .f16.e4m3): d[64, 128] = a[64, 32]
// b[128, 32]^T, two sums a register; which rows and columns: wgmma.cuh, entries 2 i and 2 i + 1 being d[i].
#pragma once

#include <cstdint>

#include "cuda/common/ptx/wgmma.cuh"

namespace adaattn::cuda::ptx {

// Descriptor of rows of 32 bytes in shared memory without a swizzle: core matrices of 8 rows of 16 bytes, one after
// another along the rows; kHalfBytes on lie those of the rows' second half.
template <int kHalfBytes>
struct CoreMatrices {
  std::uint32_t low;

  // See WgmmaOperand for the shuffle.
  __device__ __forceinline__ explicit CoreMatrices(std::uint32_t shared_address)
      : low(__shfl_sync(0xFFFFFFFFu, (shared_address & 0x3FFFF) >> 4 | (kHalfBytes >> 4) << 16, 0)) {}

  // This many bytes further on.
  __device__ __forceinline__ std::uint64_t at(std::uint32_t bytes) const {
    constexpr std::uint64_t kCoreBytes = 128;
    return (kCoreBytes >> 4) << 32 | (low + (bytes >> 4));
  }
};

// a: of thread t of the warpgroup the rows 16 (t / 32) + t % 32 / 4 and 8 below, in turn, bytes 4 (t % 4) on (a[0],
// a[1]) and 16 further (a[2], a[3]).
__device__ __forceinline__ void wgmma_e4m3_rs(std::uint32_t (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n}\n"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]), "=r"(d[4]), "=r"(d[5]), "=r"(d[6]), "=r"(d[7]), "=r"(d[8]),
        "=r"(d[9]), "=r"(d[10]), "=r"(d[11]), "=r"(d[12]), "=r"(d[13]), "=r"(d[14]), "=r"(d[15]), "=r"(d[16]),
        "=r"(d[17]), "=r"(d[18]), "=r"(d[19]), "=r"(d[20]), "=r"(d[21]), "=r"(d[22]), "=r"(d[23]), "=r"(d[24]),
        "=r"(d[25]), "=r"(d[26]), "=r"(d[27]), "=r"(d[28]), "=r"(d[29]), "=r"(d[30]), "=r"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace adaattn::cuda::ptx
