// One pass over k and v: a persistent, warp-specialised kernel. One thread copies blocks of keys (TMA) through a ring
// of buffers; two warpgroups take them, 64 probe rows each. Each thread block has as many blocks of keys as the others.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/once.h"
#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/adaptive/measure.h"
#include "cuda/sm90/adaptive/measure_prepare.cuh"
#include "cuda/sm90/adaptive/measure_probe.cuh"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kWarps = kProbeRows / 16, kConsumers = kWarps * 32, kThreads = kConsumers + 128;
constexpr int kStages = 3;
constexpr int kSpan = 64;
constexpr int kKeptMasses = 8;  // blocks whose masses are written together: 64 bytes of a row

template <int kDim>
struct MeasureMemory {
  struct Stage {
    std::uint16_t k[kBlockKeys * kDim], v[kBlockKeys * kDim];  // in panels
  };
  alignas(1024) Stage stages[kStages];
  std::uint16_t y[kScreenRank * kDim];  // in rows
  Mass masses[kProbeRows][kKeptMasses];
  ptx::Barrier full[kStages], empty[kStages];
};

// What this thread block has of a query head; calls visit with each chunk that is measured.
struct Chunk {
  int query_head, key_head, first_block, count;  // blocks within the head
};
template <typename Visitor>
__device__ __forceinline__ void for_each_chunk(const AdaptiveShape& shape, const AdaptiveArrays& arrays,
                                               const Visitor& visit) {
  const int worker = static_cast<int>(blockIdx.x), blocks = shape.blocks(), end = shape.share_begin(worker + 1);
#pragma unroll 1
  for (int at = shape.share_begin(worker); at < end;) {
    const int query_head = at / blocks, first_block = at % blocks;
    const Chunk chunk{.query_head = query_head,
                      .key_head = query_head / shape.group,
                      .first_block = first_block,
                      .count = min(blocks - first_block, end - at)};
    if (arrays.energy[chunk.key_head] >= kLeastScreenEnergy) visit(chunk);
    at += chunk.count;
  }
}

// By one thread.
template <int kDim>
__device__ __forceinline__ void produce(const AdaptiveShape& shape, const CUtensorMap& k, const CUtensorMap& v,
                                        const AdaptiveArrays& arrays, MeasureMemory<kDim>& shared) {
  const int key_heads = shape.heads / shape.group;
  ptx::RingPlace<kStages> place;
  for_each_chunk(shape, arrays, [&](const Chunk& chunk) {
    for (int block = 0; block < chunk.count; ++block) {
      const int first = (chunk.first_block + block) * kBlockKeys;
      auto& stage = shared.stages[place.stage];
      auto& full = shared.full[place.stage];
      ptx::wait(shared.empty[place.stage], place.parity ^ 1);
      ptx::arrive_and_expect(full, sizeof(stage));
      for (int column = 0; column < kDim; column += 64)
        ptx::load_box(stage.k + column * kBlockKeys, k, full, column, first, chunk.key_head % key_heads,
                      chunk.key_head / key_heads);
      for (int column = 0; column < kDim; column += 64)
        ptx::load_box(stage.v + column * kBlockKeys, v, full, column, first, chunk.key_head % key_heads,
                      chunk.key_head / key_heads);
      place.advance();
    }
  });
}

// By all consumers together.
template <int kDim>
__device__ __forceinline__ void load_y(const std::uint16_t* from, std::uint16_t* to) {
  constexpr int kPieces = kDim / 8;
  ptx::barrier_sync(1, kConsumers);  // the last chunk's is read no more
  for (int at = static_cast<int>(threadIdx.x); at < kScreenRank * kPieces; at += kConsumers)
    *reinterpret_cast<uint4*>(to + piece_offset<kDim>(at / kPieces, at % kPieces) / 2) =
        __ldg(reinterpret_cast<const uint4*>(from) + at);
  ptx::barrier_sync(1, kConsumers);
}

template <int kDim, typename T>
__device__ __forceinline__ void consume(const AdaptiveShape& shape, const Rows16& q, const AdaptiveArrays& to,
                                        const Chunk& chunk, MeasureMemory<kDim>& shared,
                                        ptx::RingPlace<kStages>& place) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool first_of_group = chunk.query_head % shape.group == 0;
  const int blocks = shape.blocks();
  ProbeRows<kDim, kSpan, T> probe;
  probe.load(shape, HeadRows(q, chunk.query_head / shape.heads, chunk.query_head % shape.heads), warp * 16, lane);
  if (first_of_group) load_y<kDim>(to.y + std::int64_t{chunk.key_head} * kScreenRank * kDim, shared.y);

  bool finite = true;
#pragma unroll 1
  for (int block = 0; block < chunk.count; ++block) {
    const int of_head = chunk.first_block + block, begin = of_head * kBlockKeys;
    const auto& stage = shared.stages[place.stage];
    const std::uint32_t k_tile = ptx::shared_address(stage.k), v_tile = ptx::shared_address(stage.v);
    const ptx::WgmmaOperand<0> k_rows(k_tile);
    const ptx::WgmmaOperand<kBlockKeys * 128> v_columns(v_tile);
    ptx::wait(shared.full[place.stage], place.parity);
    Mass masses[2] = {{-INFINITY, 0}, {-INFINITY, 0}};
#pragma unroll 1
    for (int span = 0; span < kBlockKeys && begin + span < probe.most_seen; span += kSpan) {
      Mass added[2];
      probe.add(k_rows, v_columns, span, begin + span, shape.scale_log2, lane, added);
      masses[0] = merge(masses[0], added[0]);
      masses[1] = merge(masses[1], added[1]);
    }
    if (lane % 4 == 0) {
      shared.masses[warp * 16 + lane / 4][of_head % kKeptMasses] = masses[0];
      shared.masses[warp * 16 + lane / 4 + 8][of_head % kKeptMasses] = masses[1];
    }
    if (first_of_group) {
      const int existing = min(kBlockKeys, shape.keys - begin);
      const std::int64_t at = std::int64_t{chunk.key_head} * blocks + of_head;
      const bool k_finite =
          screen_keys<kDim, T>(k_tile, ptx::shared_address(shared.y), to.y_means + chunk.key_head * kScreenRank,
                               warp * 16, existing, lane, to.k8 + at * kBlockKeys * kScreenRank);
      finite = finite && k_finite;
      if (warp < kDim / 16) {
        const bool v_finite = mean_values<kDim, T>(v_tile, warp * 16, existing, lane, to.value_means + at * kDim);
        finite = finite && v_finite;
      }
    }
    __syncwarp();
    if (lane == 0) ptx::arrive(shared.empty[place.stage]);
    place.advance();
    if (of_head % kKeptMasses == kKeptMasses - 1 || block == chunk.count - 1) {
      __syncwarp();
      const int first = max(chunk.first_block, of_head / kKeptMasses * kKeptMasses), kept = of_head + 1 - first;
      for (int i = lane; i < 16 * kept; i += 32) {
        const int row = warp * 16 + i / kept, written = first + i % kept;
        to.block_masses[(std::int64_t{chunk.query_head} * kProbeRows + row) * blocks + written] =
            shared.masses[row][written % kKeptMasses];
      }
      __syncwarp();  // before the next ones
    }
  }
  if (!__all_sync(0xFFFFFFFFU, finite) && lane == 0) atomicOr(&to.not_finite[chunk.key_head], 1U);

  const std::int64_t row = (std::int64_t{chunk.query_head} + blockIdx.x) * kProbeRows + warp * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane % 4 == 0) to.chunk_masses[row + half * 8] = {probe.top[half], probe.sum[half]};
    if (probe.sum[half] == 0) continue;
    float* out = to.chunk_out + (row + half * 8) * kDim + lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t)
      *reinterpret_cast<float2*>(out + t * 8) = {probe.out[t * 4 + half * 2], probe.out[t * 4 + half * 2 + 1]};
  }
}

template <int kDim, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    measure_kernel(AdaptiveShape shape, Rows16 q, const __grid_constant__ CUtensorMap k,
                   const __grid_constant__ CUtensorMap v, AdaptiveArrays to) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<MeasureMemory<kDim>*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init_barrier(shared.full[stage], 1);
      ptx::init_barrier(shared.empty[stage], kWarps);
    }
    ptx::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    ptx::give_registers<24>();
    if (threadIdx.x == kConsumers) produce<kDim>(shape, k, v, to, shared);
    return;
  }
  ptx::take_registers<240>();
  ptx::RingPlace<kStages> place;
  for_each_chunk(shape, to, [&](const Chunk& chunk) { consume<kDim, T>(shape, q, to, chunk, shared, place); });
}

CUtensorMap map_of(const Rows16& rows, const AdaptiveShape& shape, int dim) {
  const adaattn_tensor tensor{.data = const_cast<std::uint16_t*>(rows.data),
                              .dtype = shape.bfloat16 ? ADAATTN_BFLOAT16 : ADAATTN_FLOAT16,
                              .device = ADAATTN_CUDA,
                              .shape = {shape.batch, shape.heads / shape.group, shape.keys, dim},
                              .stride = {rows.stride[0], rows.stride[1], rows.stride[2], 1}};
  return make_tensor_map(tensor, kBlockKeys);
}

template <int kDim, typename T>
void launch(const AdaptiveShape& shape, const Rows16& q, const Rows16& k, const Rows16& v, const AdaptiveArrays& to,
            cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(MeasureMemory<kDim>);
  static_assert(kSharedBytes <= 227 * 1024);
  static OncePerDevice prepared;
  prepared.run(current_device().index, [] {
    ADAATTN_CUDA_CHECK(
        cudaFuncSetAttribute(measure_kernel<kDim, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  });
  measure_kernel<kDim, T><<<static_cast<unsigned>(shape.workers), kThreads, kSharedBytes, stream>>>(
      shape, q, map_of(k, shape, shape.dim_qk), map_of(v, shape, shape.dim_v), to);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_measure(const AdaptiveShape& shape, Rows16 q, Rows16 k, Rows16 v, const AdaptiveArrays& to,
                    cudaStream_t stream) {
  const auto run = [&](auto launch_it) { launch_it(shape, q, k, v, to, stream); };
  if (shape.dim == 64)
    shape.bfloat16 ? run(launch<64, __nv_bfloat16>) : run(launch<64, __half>);
  else
    shape.bfloat16 ? run(launch<128, __nv_bfloat16>) : run(launch<128, __half>);
}

}  // namespace adaattn::cuda::sm90
