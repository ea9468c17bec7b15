// What ordinary instructions get on Hopper while another warpgroup's products run, and what is left to these: both read
// and write the register file. Prints, for each mix, instructions issued per scheduler and cycle and the share of the
// time the tensor cores are busy (2,048 multiply-adds of bfloat16 a cycle).
//
//     build/cuda/bench/contention
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_rs.cuh"
#include "cuda/common/ptx/wgmma_ss.cuh"

namespace {

namespace ptx = adaattn::cuda::ptx;
using Element = __nv_bfloat16;

enum class Products { kNone, kShared, kRegisters };  // where the left side comes from
enum class Mix { kFma, kExp2, kMax, kSoftmax };
constexpr const char* kProductNames[] = {"none", "both sides from shared memory", "left side from registers"};
constexpr const char* kMixNames[] = {"fma, 3 operands", "exp2", "max, 2 operands", "softmax: fma, exp2, add, 1/2 pack"};
constexpr int kValues = 64, kRounds = 400, kSharedBytes = 65536;
constexpr int kInstructions[] = {kValues, kValues, kValues + 2, kValues * 7 / 2};  // a round

struct Report {
  unsigned long long cycles[3];  // of each arithmetic warpgroup of the first block
  unsigned long long products;
};

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "contention: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

template <Mix kMix>
__device__ __forceinline__ void one_round(float (&x)[kValues], float a, float b, float (&sums)[2]) {
  if constexpr (kMix == Mix::kFma) {
#pragma unroll
    for (float& value : x) asm volatile("fma.rn.ftz.f32 %0, %0, %1, %2;" : "+f"(value) : "f"(a), "f"(b));
  } else if constexpr (kMix == Mix::kExp2) {
#pragma unroll
    for (float& value : x) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(value));
  } else if constexpr (kMix == Mix::kMax) {
    float tops[4] = {sums[0], sums[1], a, b};
#pragma unroll
    for (int i = 0; i < kValues; ++i) asm volatile("max.NaN.f32 %0, %0, %1;" : "+f"(tops[i % 4]) : "f"(x[i]));
    sums[0] = tops[0] + tops[2], sums[1] = tops[1] + tops[3];
  } else {
#pragma unroll
    for (float& value : x) value = ptx::exp2_fast(fmaf(value, a, b));
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i % 2] += x[i];
#pragma unroll
    for (int i = 0; i < kValues; i += 2) x[i] = __uint_as_float(ptx::pack<Element>(x[i], x[i + 1]));
  }
}

// One warpgroup multiplies until all others have done their rounds.
template <Products kProducts, Mix kMix>
__global__ void __launch_bounds__(512) contend(float a, float b, float* sink, Report* report) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ int done, go_on;
  if (threadIdx.x == 0) done = 0;
  for (unsigned i = threadIdx.x; i < kSharedBytes / 4; i += blockDim.x)
    reinterpret_cast<std::uint32_t*>(memory)[i] = 0x3C003C00u + ((i * 2654435761u >> 16) & 0x03FF03FFu);
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / ptx::kWarpgroupThreads, 0);
  const int first = kProducts == Products::kNone ? 0 : 1;
  const int others = static_cast<int>(blockDim.x) / ptx::kWarpgroupThreads - first;
  if (group < first) {
    const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
    const ptx::WgmmaOperand<0> left(base), right(base + 16384);
    const ptx::WgmmaOperand<128 * 128> column(base + 32768);
    float sums[kValues] = {};
    std::uint32_t held[32];
    for (auto& word : held) word = 0x3C003C00u + threadIdx.x;
    unsigned long long products = 0;
    for (;;) {
      ptx::barrier_sync(1, ptx::kWarpgroupThreads);
      if (threadIdx.x == 0) go_on = atomicAdd(&done, 0) < others;
      ptx::barrier_sync(1, ptx::kWarpgroupThreads);
      if (!go_on) break;
      for (int batch = 0; batch < 8; ++batch, products += 8) {
        ptx::pin_registers(sums);
        ptx::pin_registers(held);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if constexpr (kProducts == Products::kShared)
            ptx::wgmma_ss<Element>(sums, left.at(i % 4 * 32), right.at(i % 4 * 32), 1);
          else
            ptx::wgmma_rs<Element>(sums, held + 4 * i, column.at(i * 16 * 128), 1);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(sums);
      }
    }
    float all = 0.0f;
    for (const float sum : sums) all += sum;
    sink[threadIdx.x] = all;
    if (threadIdx.x == 0 && blockIdx.x == 0) report->products = products;
    return;
  }
  float x[kValues], sums[2] = {};
  for (int i = 0; i < kValues; ++i) x[i] = static_cast<float>(threadIdx.x * kValues + i) * 1e-4f;
  const long long begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) one_round<kMix>(x, a, b, sums);
  const long long end = clock64();
  float all = sums[0] + sums[1];
  for (const float value : x) all += value;
  sink[threadIdx.x] = all;
  ptx::barrier_sync(2 + group, ptx::kWarpgroupThreads);
  if (threadIdx.x % ptx::kWarpgroupThreads != 0) return;
  if (blockIdx.x == 0) report->cycles[group - first] = static_cast<unsigned long long>(end - begin);
  atomicAdd(&done, 1);
}

template <Products kProducts, Mix kMix>
void measure(int warpgroups, float* sink, Report* report) {
  const auto kernel = contend<kProducts, kMix>;
  const int threads = ptx::kWarpgroupThreads * (warpgroups + (kProducts == Products::kNone ? 0 : 1));
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  check(cudaMemset(report, 0, sizeof(Report)));
  kernel<<<multiprocessors, threads, kSharedBytes>>>(0.999f, 1e-3f, sink, report);
  check(cudaGetLastError());
  Report got;
  check(cudaMemcpy(&got, report, sizeof(got), cudaMemcpyDeviceToHost));
  unsigned long long most = 1;
  for (const unsigned long long cycles : got.cycles) most = cycles > most ? cycles : most;
  constexpr double kProductCycles = 64.0 * 128 * 16 / 2048;
  std::printf(
      "%-29s | %-33s | %d | %.2f | %.2f\n", kProductNames[static_cast<int>(kProducts)],
      kMixNames[static_cast<int>(kMix)], warpgroups,
      warpgroups * kRounds * static_cast<double>(kInstructions[static_cast<int>(kMix)]) / static_cast<double>(most),
      static_cast<double>(got.products) * kProductCycles / static_cast<double>(most));
}

template <Products kProducts>
void measure_mixes(int warpgroups, float* sink, Report* report) {
  measure<kProducts, Mix::kFma>(warpgroups, sink, report);
  measure<kProducts, Mix::kExp2>(warpgroups, sink, report);
  measure<kProducts, Mix::kMax>(warpgroups, sink, report);
  measure<kProducts, Mix::kSoftmax>(warpgroups, sink, report);
}

}  // namespace

int main() {
  float* sink = nullptr;
  Report* report = nullptr;
  check(cudaMalloc(&sink, 512 * sizeof(float)));
  check(cudaMalloc(&report, sizeof(Report)));
  std::printf("products | instructions | warps a scheduler | issued per scheduler and cycle | tensor cores busy\n");
  for (int warpgroups = 1; warpgroups <= 3; ++warpgroups) {
    measure_mixes<Products::kNone>(warpgroups, sink, report);
    measure_mixes<Products::kShared>(warpgroups, sink, report);
    measure_mixes<Products::kRegisters>(warpgroups, sink, report);
  }
  return 0;
}
