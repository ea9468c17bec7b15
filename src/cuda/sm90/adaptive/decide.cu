// How many blocks each head's tiles keep: the fewest whose error, told from the probe rows, is within the budget.
//
// A probe row's exact output o, its blocks' masses m and the means vbar of their values are known. Leaving blocks out
// moves it by ||sum m (vbar - o)|| / (1 - sum m), the sums over these blocks: exact if each block's values were alike.
#include <cuda_runtime.h>

#include <cmath>

#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/once.h"
#include "cuda/sm90/adaptive/head.cuh"
#include "cuda/sm90/adaptive/stages.h"
#include "verify/estimate.h"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kRows = kProbeRows / kDecideParts, kThreads = 32 * kRows;  // a warp has a row
constexpr int kNumbers = sizeof(LevelSums) / sizeof(float);
static_assert(kLevels * kNumbers <= kThreads);

// Of the budget: what is predicted may reach, and its limit. What is measured in the end has to hold the limit, too,
// and is not told by means of values.
constexpr float kValueShare = 0.75f, kLimitShare = 0.9f;
// A head that keeps more of its blocks than this runs densely.
constexpr float kMostKept = 0.95f;

// What a lane has of a row.
template <int kDim>
struct RowPart {
  static constexpr int kCount = kDim / 32;
  float of[kCount] = {};

  __device__ static int channel() { return static_cast<int>(threadIdx.x) % 32 * kCount; }
  __device__ void load(const float* row) {
    if constexpr (kCount == 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(row + channel()));
      of[0] = x.x, of[1] = x.y, of[2] = x.z, of[3] = x.w;
    } else {
      const float2 x = __ldg(reinterpret_cast<const float2*>(row + channel()));
      of[0] = x.x, of[1] = x.y;
    }
  }
  __device__ void add(float factor, const RowPart& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of[i] = fmaf(factor, other.of[i], of[i]);
  }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  return value;
}

// This lane's share of ||factor a - b||^2 over a row.
template <int kDim>
__device__ float squared_distance(float factor, const RowPart<kDim>& a, const RowPart<kDim>& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < RowPart<kDim>::kCount; ++i) {
    const float difference = fmaf(factor, a.of[i], -b.of[i]);
    sum = fmaf(difference, difference, sum);
  }
  return sum;
}

// The row's exact output from those of its chunks, and the logarithm of its sum; -inf: it sees no key.
template <int kDim>
__device__ float merge_chunks(const AdaptiveShape& shape, const AdaptiveArrays& arrays, int head, int row,
                              RowPart<kDim>& out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, blocks = shape.blocks();
  const int first = shape.worker_of(head * blocks), chunks = shape.worker_of((head + 1) * blocks - 1) + 1 - first;
  const auto at = [&](int chunk) { return (std::int64_t{head} + first + chunk) * kProbeRows + row; };
  float top = -INFINITY;
  for (int chunk = lane; chunk < chunks; chunk += 32) top = fmaxf(top, arrays.chunk_masses[at(chunk)].top);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, lanes));
  if (top == -INFINITY) return top;
  float sum = 0;
#pragma unroll 4
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Mass mass = arrays.chunk_masses[at(chunk)];
    if (mass.sum == 0) continue;  // nor is its output there
    const float factor = exp2f(mass.top - top);
    sum = fmaf(factor, mass.sum, sum);
    RowPart<kDim> of_chunk;
    of_chunk.load(arrays.chunk_out + at(chunk) * kDim);
    out.add(factor, of_chunk);
  }
#pragma unroll
  for (float& value : out.of) value /= sum;
  return top + log2f(sum);
}

struct BlockShare {
  float share;
  int block;
};

// Lanes' shares of a row's squared error at each level. The last column is empty: it keeps levels, which lanes sum
// side by side, in different banks.
using LaneErrors = float[kLevels][33];

// shares: of the row's visible blocks, in order; level_end: of this lane's level, how many of them it keeps.
template <int kDim>
__device__ void leave_out(const float* means, const BlockShare* shares, int visible, int level_end,
                          const RowPart<kDim>& out, LaneErrors& errors) {
  constexpr int kAhead = 4;  // blocks whose means are on their way
  const int lane = static_cast<int>(threadIdx.x) % 32;
  RowPart<kDim> left_out;
  float mass = 0, error = 0;
  int level = kLevels - 1, end = visible;
  const auto settle = [&](int begin) {  // levels that leave out all blocks from begin on, and no others
    while (level >= 0 && end >= begin) {
      errors[level][lane] = error;
      --level;
      end = __shfl_sync(0xFFFFFFFFu, level_end, level & 31);
    }
  };
  settle(visible);
  for (int last = visible - 1; level >= 0 && last >= 0; last -= kAhead) {
    BlockShare of_block[kAhead];
    RowPart<kDim> mean[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      of_block[i] = shares[max(last - i, 0)];
      mean[i].load(means + static_cast<std::int64_t>(of_block[i].block) * kDim);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (level < 0 || last < i) break;
      mass += of_block[i].share;
      left_out.add(of_block[i].share, mean[i]);
      if (end < last - i) continue;
      const float rest = fmaxf(1 - mass, 1e-6f);
      error = __fdividef(squared_distance(mass, out, left_out), rest * rest);
      settle(last - i);
    }
  }
}

// This thread block's rows: their exact outputs, and the sums for each level that blocks may be kept up to.
template <int kDim>
__device__ void sum_levels(const AdaptiveShape& shape, const AdaptiveArrays& arrays, int head, LevelSums* result) {
  extern __shared__ __align__(8) unsigned char memory[];
  __shared__ LaneErrors lane_errors[kRows];
  __shared__ float errors[kRows][kLevels], norms[kRows];  // squared; norms of rows that see no key are -1
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * kRows + warp;
  const int blocks = shape.blocks(), key_head = key_head_of(shape, head);
  const std::int64_t tile =
      static_cast<std::int64_t>(head) * shape.tiles() + probe_row(row, shape.queries) / shape.tile_rows;
  const std::uint16_t* const order = arrays.order + tile * blocks;
  const std::uint16_t* const up_to = arrays.up_to_level + tile * kLevels;
  const Mass* const masses = arrays.block_masses + (static_cast<std::int64_t>(head) * kProbeRows + row) * blocks;
  const float* const means = arrays.value_means + static_cast<std::int64_t>(key_head) * blocks * kDim;

  RowPart<kDim> out;
  const float lse = merge_chunks(shape, arrays, head, row, out);
  float* const exact = arrays.exact_out + (static_cast<std::int64_t>(head) * kProbeRows + row) * kDim;
#pragma unroll
  for (int i = 0; i < RowPart<kDim>::kCount; ++i) exact[RowPart<kDim>::channel() + i] = out.of[i];

  if (lse == -INFINITY) {
    if (lane < kLevels) errors[warp][lane] = 0;
    if (lane == 0) norms[warp] = -1;
  } else {
    // Shares of the row's softmax in the order of its tile: to shared memory first, since each takes a chain of loads.
    BlockShare* const shares = reinterpret_cast<BlockShare*>(memory) + warp * blocks;
    const int visible = up_to[kLevels - 1];
    for (int i = lane; i < visible; i += 32) {
      const int block = order[i];
      const Mass mass = masses[block];
      shares[i] = {.share = mass.sum * exp2f(mass.top - lse), .block = block};
    }
    const int level_end = lane < kLevels ? up_to[lane] : 0;
    __syncwarp();
    const float norm = warp_sum(squared_distance(0, out, out));
    if (lane == 0) norms[warp] = norm;
    leave_out(means, shares, visible, level_end, out, lane_errors[warp]);
    __syncwarp();
    float sum = 0;
    if (lane < kLevels) {
#pragma unroll 8
      for (int other = 0; other < 32; ++other) sum += lane_errors[warp][lane][other];
      errors[warp][lane] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kLevels) return;
  LevelSums total{};
  for (int i = 0; i < kRows; ++i) {
    const float y = norms[i], x = errors[i][threadIdx.x];
    if (y < 0) continue;
    total.x += x, total.xx += x * x, total.xy += x * y;
    total.y += y, total.yy += y * y, total.rows += 1;
  }
  result[threadIdx.x] = total;
}

// Chooses the level, and writes what the head's tiles keep.
__device__ void choose(const AdaptiveShape& shape, const AdaptiveArrays& arrays, int head, bool screened, int given) {
  __shared__ int level, kept, visible;
  __shared__ ErrorEstimate found[kLevels];
  __shared__ double totals[kLevels][kNumbers];
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) level = kLevels - 1, kept = visible = 0;
  __syncthreads();
  if (screened && tid < kLevels * kNumbers) {
    const LevelSums* const parts = arrays.level_sums + static_cast<std::int64_t>(head) * kDecideParts * kLevels;
    double total = 0;
#pragma unroll
    for (int part = 0; part < kDecideParts; ++part)
      total += reinterpret_cast<const float*>(parts + part * kLevels)[tid];
    totals[tid / kNumbers][tid % kNumbers] = total;
  }
  __syncthreads();
  if (screened && tid < kLevels) {
    const double(&of)[kNumbers] = totals[tid];
    found[tid] = estimate_error({.rows = of[5], .x = of[0], .y = of[3], .xx = of[1], .xy = of[2], .yy = of[4]}, 0, 0);
    const double error = shape.error;
    if (found[tid].value <= kValueShare * error && accepts(found[tid], kLimitShare * error)) atomicMin(&level, tid);
  }
  __syncthreads();
  // A given level needs no room between what is predicted and what will be measured: whoever gives it has measured it.
  const bool take = screened && given >= 0 && given < kLevels &&
                    (given == kLevels - 1 || accepts(found[given], static_cast<double>(shape.error)));
  const int chosen = !screened ? kLevels - 1 : take ? given : level;
  const std::uint16_t* const up_to = arrays.up_to_level + static_cast<std::int64_t>(head) * shape.tiles() * kLevels;
  for (int tile = tid; tile < shape.tiles(); tile += kThreads) {
    atomicAdd(&kept, static_cast<int>(up_to[tile * kLevels + chosen]));
    atomicAdd(&visible, static_cast<int>(up_to[tile * kLevels + kLevels - 1]));
  }
  __syncthreads();
  const bool dense = static_cast<float>(kept) > kMostKept * static_cast<float>(visible) || !screened;
  const int final_level = dense ? kLevels - 1 : chosen;
  for (int tile = tid; tile < shape.tiles(); tile += kThreads)
    arrays.kept[static_cast<std::int64_t>(head) * shape.tiles() + tile] = up_to[tile * kLevels + final_level];
  if (tid != 0) return;
  arrays.states[head] = {.level = final_level,
                         .escalations = 0,
                         .value = dense ? 0.0f : static_cast<float>(found[chosen].value),
                         .limit = dense ? 0.0f : static_cast<float>(found[chosen].limit),
                         .visible = visible,
                         .kept = dense ? visible : kept,
                         .energy = arrays.energy[key_head_of(shape, head)]};
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 5)
    decide_kernel(const __grid_constant__ AdaptiveShape shape, const __grid_constant__ AdaptiveArrays arrays) {
  __shared__ bool last;
  const int head = static_cast<int>(blockIdx.y);
  const bool screened = is_screened(shape, arrays, head);
  const int given = arrays.given != nullptr ? arrays.given[head] : -1;
  if (!screened) {
    if (blockIdx.x == 0) choose(shape, arrays, head, false, given);
    return;
  }
  LevelSums* const sums = arrays.level_sums + (static_cast<std::int64_t>(head) * kDecideParts + blockIdx.x) * kLevels;
  sum_levels<kDim>(shape, arrays, head, sums);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&arrays.counters[head], kDecideParts - 1) == kDecideParts - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  choose(shape, arrays, head, true, given);
}

}  // namespace

void launch_decide(const AdaptiveShape& shape, const AdaptiveArrays& arrays, cudaStream_t stream) {
  const dim3 grid(kDecideParts, static_cast<unsigned>(shape.query_heads()));
  const auto kernel = shape.dim == 64 ? decide_kernel<64> : decide_kernel<128>;
  const auto shared_of = [](int blocks) { return static_cast<int>(sizeof(BlockShare)) * kRows * blocks; };
  static OncePerDevice prepared;
  prepared.run(current_device().index, [&] {
    for (const auto any : {decide_kernel<64>, decide_kernel<128>})
      ADAATTN_CUDA_CHECK(
          cudaFuncSetAttribute(any, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_of(kMostBlocks)));
  });
  kernel<<<grid, kThreads, shared_of(shape.blocks()), stream>>>(shape, arrays);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
