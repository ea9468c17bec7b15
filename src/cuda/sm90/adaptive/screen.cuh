// The screen's kernel. A block of threads is a producer warp, which brings blocks of keys into a ring, and kConsumers
// warpgroups, one or two neighbouring strips of 64 queries each. Strips are dealt out longest first, those of query
// heads that share a key head side by side: they use the same keys.
//
// Per 64 queries and 128 keys the tensor cores take 64 cycles, and so do the maxima if each reads two operands; with
// three, half. A warpgroup has a second product under way while it reduces the first, so that few of them keep the
// tensor cores busy while others begin or end. Two strips a warpgroup, as keys come from L2: 4 KB for three strips
// every 192 cycles were 5 TB/s on all multiprocessors, about what it has.
#pragma once

#include <cuda_fp16.h>

#include <cmath>

#include "cuda/common/ptx/mbarrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/common/ptx/wgmma_fp8.cuh"
#include "cuda/sm90/adaptive/screen.h"
#include "cuda/sm90/adaptive/screen_queries.cuh"

namespace adaattn::cuda::sm90 {

struct ScreenParams {
  AdaptiveShape shape;
  Rows16 q;
  AdaptiveArrays arrays;
};

// kStrips: of a warpgroup. kAhead: whether a second product runs while one is reduced.
template <int kConsumers_, int kResident_, int kStrips_, int kStages_, bool kAhead_ = true>
struct ScreenConfig {
  static constexpr int kConsumers = kConsumers_, kResident = kResident_, kStrips = kStrips_, kStages = kStages_;
  static constexpr bool kAhead = kAhead_;
  static constexpr int kAllStrips = kConsumers * kStrips;
  static constexpr int kThreads = 128 * kConsumers + 32;
};

// Rows' maxima are words of two float16, of the rows 16 (word / 8) + word % 8 and 8 below.
constexpr int kScreenWords = kScreenRows / 2;

template <typename Config>
struct ScreenShared {
  alignas(128) std::uint8_t keys[Config::kStages][kScreenBlockBytes];
  float2 margins[Config::kAllStrips][kScreenWords];
  std::uint32_t best[Config::kAllStrips][kScreenWords];
  ptx::Barrier full[Config::kStages], empty[Config::kStages];
  // And after it tops [kAllStrips][blocks][kScreenWords].

  static constexpr int bytes(int blocks) {
    return static_cast<int>(sizeof(ScreenShared)) + Config::kAllStrips * blocks * kScreenWords * 4;
  }
};

struct Strip {
  int first_row;
  int blocks;        // that its last row sees, some key of each
  int whole_blocks;  // that its first row, and so each, sees all keys of
};

__device__ __forceinline__ Strip strip_of(const AdaptiveShape& shape, int strip) {
  const int first = strip * kScreenRows, last = min(first + kScreenRows, shape.queries) - 1;
  return {first, (shape.seen(last) + kBlockKeys - 1) / kBlockKeys, shape.seen(first) / kBlockKeys};
}

// Puts -inf in place of the scores of keys from seen on, keys of the block that each of the lane's two rows sees.
__device__ __forceinline__ void hide_keys(std::uint32_t (&scores)[32], const int (&seen)[2], int lane) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int column = 8 * (i / 2) + 2 * (lane % 4), count = seen[i % 2];
    const std::uint32_t one = (scores[i] & 0xFFFFu) | 0xFC00'0000u;
    scores[i] = column >= count ? 0xFC00'FC00u : column + 1 >= count ? one : scores[i];
  }
}

// The lane's maxima of its two rows, as one word.
__device__ __forceinline__ std::uint32_t lane_maxima(const std::uint32_t (&scores)[32]) {
  std::uint32_t upper = scores[0], lower = scores[1];
#pragma unroll
  for (int i = 2; i < 32; i += 2)
    upper = ptx::max_halves(upper, scores[i]), lower = ptx::max_halves(lower, scores[i + 1]);
  return ptx::max_halves(__byte_perm(upper, lower, 0x5410), __byte_perm(upper, lower, 0x7632));
}

// Of four lanes with the same two rows.
__device__ __forceinline__ std::uint32_t quad_maxima(std::uint32_t maxima) {
  maxima = ptx::max_halves(maxima, __shfl_xor_sync(0xFFFFFFFFu, maxima, 1));
  return ptx::max_halves(maxima, __shfl_xor_sync(0xFFFFFFFFu, maxima, 2));
}

// A block counts as nearer to a row's best by this many standard deviations of what the screen does not see of the
// row's scores; cpu/screen_panel-inl.h has the same.
constexpr float kUnseenMargin = 2;
// Of a screened score's: rounding to three bits after the leading one is wrong by at most 2^-4 of a number, evenly
// spread over that, hence 2^-4 / sqrt(3) of it; both factors are, independently of each other: sqrt(2) times as much.
constexpr float kScreenRounding = 0.05f;

// Of a row, per unit of its |q z|: what lies outside the screen's basis if the row is as the average one, and rounding.
// energy: of the key head, above 0.
__device__ __forceinline__ float margin_per_norm(float energy) {
  return kUnseenMargin * sqrtf(fmaxf(1 - energy, 0.0f) / energy + kScreenRounding * kScreenRounding);
}

// best - top of one row less its margin, not below 0, as the bits of a float32, whose order is theirs. Sums beyond
// float16's range are infinite: taken for its largest number.
__device__ __forceinline__ unsigned gap_bits(float best, float top, float margin) {
  constexpr float kMost = 65504.0f;
  best = fminf(fmaxf(best, -kMost), kMost);
  top = fminf(fmaxf(top, -kMost), kMost);
  return __float_as_uint(fmaxf(best - top - margin, 0.0f));
}

// distances[block] of a strip, by its warpgroup, once all its warps' tops, best and margins are there.
__device__ __forceinline__ void write_distances(const AdaptiveShape& shape, const Strip& strip,
                                                const std::uint32_t* tops, const std::uint32_t* best_words,
                                                const float2* margins, int warp, int lane, float* distances) {
  constexpr unsigned kInfinity = 0x7F80'0000u;
  constexpr int kAtOnce = 8;  // blocks of a warp: one sector of distances
  const float2 best = __half22float2(reinterpret_cast<const __half2*>(best_words)[lane]), margin = margins[lane];
  int blocks_seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = strip.first_row + 16 * (lane / 8) + lane % 8 + 8 * half;
    blocks_seen[half] = row < shape.queries ? (shape.seen(row) + kBlockKeys - 1) / kBlockKeys : 0;
  }
  const int blocks = shape.blocks();
#pragma unroll 1
  for (int first = kAtOnce * warp; first < blocks; first += 4 * kAtOnce) {
    unsigned mine = kInfinity;
    if (first < strip.blocks) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int block = first + i;
        const float2 top =
            __half22float2(reinterpret_cast<const __half2*>(tops)[min(block, strip.blocks - 1) * kScreenWords + lane]);
        const unsigned upper = block < blocks_seen[0] ? gap_bits(best.x, top.x, margin.x) : kInfinity;
        const unsigned lower = block < blocks_seen[1] ? gap_bits(best.y, top.y, margin.y) : kInfinity;
        const unsigned gap = __reduce_min_sync(0xFFFFFFFFu, min(upper, lower));
        mine = lane == i ? gap : mine;
      }
    }
    if (lane < kAtOnce && first + lane < blocks) distances[first + lane] = 0.0f - __uint_as_float(mine);
  }
}

template <typename Config>
__device__ __forceinline__ void produce_keys(ScreenShared<Config>& shared, const std::uint8_t* keys, int blocks) {
  ptx::RingPlace<Config::kStages> place;
  for (int block = 0; block < blocks; ++block) {
    if (block >= Config::kStages) ptx::wait(shared.empty[place.stage], place.parity ^ 1);
    ptx::arrive_and_expect(shared.full[place.stage], kScreenBlockBytes);
    ptx::load_bytes(shared.keys[place.stage], keys + static_cast<std::int64_t>(block) * kScreenBlockBytes,
                    kScreenBlockBytes, shared.full[place.stage]);
    place.advance();
  }
}

// Products of a warpgroup's strips with the ring's blocks in turn.
template <typename Config>
struct ScreenProducts {
  ScreenShared<Config>& shared;
  ptx::CoreMatrices<kScreenBlockBytes / 2> keys;
  int lane;
  ptx::RingPlace<Config::kStages> next = {}, oldest = {};  // block to begin with, and to release

  // One of two, which are of two strips with one block, or of one strip with two blocks.
  template <int kWhich>
  __device__ __forceinline__ void begin(std::uint32_t (&scores)[32], const std::uint32_t (&queries)[4]) {
    constexpr bool kFirstOfBlock = Config::kStrips == 1 || kWhich == 0,
                   kLastOfBlock = Config::kStrips == 1 || kWhich == 1;
    if constexpr (kFirstOfBlock) ptx::wait(shared.full[next.stage], next.parity);
    ptx::wgmma_fence();
    ptx::wgmma_e4m3_rs(scores, queries, keys.at(next.stage * kScreenBlockBytes));
    ptx::wgmma_commit();
    if constexpr (kLastOfBlock) next.advance();
  }
  // Until all but the kLeft last ones are done.
  template <int kWhich, int kLeft>
  __device__ __forceinline__ void end(std::uint32_t (&scores)[32]) {
    ptx::wgmma_wait<kLeft>();
    ptx::pin_registers(scores);
    if constexpr (Config::kStrips == 1 || kWhich == 1) release();
  }
  __device__ __forceinline__ void release() {
    if (lane == 0) ptx::arrive(shared.empty[oldest.stage]);
    oldest.advance();
  }
  __device__ __forceinline__ void skip() {
    ptx::wait(shared.full[next.stage], next.parity);
    next.advance();
    release();
  }
};

// Of two products' maxima, those of the first in even lanes, of the second in odd ones.
__device__ __forceinline__ std::uint32_t traded_maxima(std::uint32_t first, std::uint32_t second, int lane) {
  const bool odd = lane & 1;
  const std::uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
  const std::uint32_t maxima = ptx::max_halves(odd ? second : first, other);
  return ptx::max_halves(maxima, __shfl_xor_sync(0xFFFFFFFFu, maxima, 2));
}

template <typename T, int kDim, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kResident)
    screen_kernel(const __grid_constant__ ScreenParams params) {
  constexpr int kStrips = Config::kStrips;
  extern __shared__ __align__(128) std::uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<ScreenShared<Config>*>(shared_bytes);
  const AdaptiveShape& shape = params.shape;
  const AdaptiveArrays& arrays = params.arrays;
  const int key_heads = shape.key_heads(), key_head = static_cast<int>(blockIdx.x) % key_heads;
  const float energy = arrays.energy[key_head];
  if (!(energy >= kLeastScreenEnergy) || arrays.not_finite[key_head] != 0) return;

  // Units of a key head: its strips, kStrips at a time, the last first, each of all the group's heads in turn.
  const int first_unit = static_cast<int>(blockIdx.x) / key_heads * Config::kConsumers;
  const int strips = shape.screen_strips(), shares = (strips + kStrips - 1) / kStrips, units = shares * shape.group;
  const int longest = min((shares - first_unit / shape.group) * kStrips, strips) - 1;  // no other strip here has more
  const int steps = strip_of(shape, longest).blocks;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::init_barrier(shared.full[i], 1);
      ptx::init_barrier(shared.empty[i], 4 * Config::kConsumers);
    }
    ptx::publish_barriers();
  }
  __syncthreads();

  const int warp_in_block = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 32, 0),
            consumer = warp_in_block / 4;
  const int warp = warp_in_block % 4, lane = static_cast<int>(threadIdx.x) % 32;
  if (consumer == Config::kConsumers) {
    if (ptx::is_elected())
      produce_keys<Config>(shared, arrays.k8 + static_cast<std::int64_t>(key_head) * shape.blocks() * kScreenBlockBytes,
                           steps);
    return;
  }

  const int unit = first_unit + consumer;
  const int first_strip = (shares - 1 - unit / shape.group) * kStrips;
  const int heads_of_keys = shape.heads / shape.group;
  const int batch = key_head / heads_of_keys, head = key_head % heads_of_keys * shape.group + unit % shape.group;
  const int word = 8 * warp + lane / 4;

  Strip own[kStrips];
  std::uint32_t queries[kStrips][4] = {};
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
    const bool exists = unit < units && first_strip + i < strips;
    own[i] = strip_of(shape, exists ? first_strip + i : 0);
    if (!exists) own[i].blocks = own[i].whole_blocks = 0;
    if (own[i].blocks == 0) continue;
    const int row = own[i].first_row + 16 * warp;
    const std::uint16_t* rows = params.q.data + batch * params.q.stride[0] + head * params.q.stride[1] +
                                static_cast<std::int64_t>(row) * params.q.stride[2];
    float2 norms;
    if (project_queries<T, kDim>(queries[i], norms, rows, params.q.stride[2], shape.queries - row, shape.dim_qk,
                                 arrays.z + static_cast<std::int64_t>(key_head) * kScreenRank * kDim, lane))
      atomicOr(arrays.not_finite + key_head, 1u);
    const float margin = margin_per_norm(energy);
    if (lane % 4 == 0) shared.margins[consumer * kStrips + i][word] = make_float2(margin * norms.x, margin * norms.y);
  }

  const int tops_of_strip = shape.blocks() * kScreenWords;
  auto* const tops = reinterpret_cast<std::uint32_t*>(shared_bytes + sizeof(ScreenShared<Config>)) +
                     consumer * kStrips * tops_of_strip;
  const std::uint32_t keys_address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared.keys[0]));
  ScreenProducts<Config> products{shared, ptx::CoreMatrices<kScreenBlockBytes / 2>(keys_address), lane};
  std::uint32_t best = 0xFC00'FC00u, first[32], second[32];
  const auto keep = [&](int block, std::uint32_t first_maxima, std::uint32_t second_maxima) {
    const std::uint32_t maxima = traded_maxima(first_maxima, second_maxima, lane);
    best = ptx::max_halves(best, maxima);
    if (lane % 4 < 2)
      tops[lane % 4 * (kStrips == 2 ? tops_of_strip : kScreenWords) + block * kScreenWords + word] = maxima;
  };

  // Blocks that all rows see all keys of: two products at a time.
  constexpr int kBlocksOfPair = 2 / kStrips;
  const auto& queries_of_second = queries[kStrips - 1];
  int block = 0;
  const int pairs = Config::kAhead ? own[0].whole_blocks / kBlocksOfPair : 0;
  std::uint32_t first_maxima[1];
#pragma unroll 1
  for (int pair = 0; pair < pairs; ++pair, block += kBlocksOfPair) {
    products.template begin<0>(first, queries[0]);
    products.template begin<1>(second, queries_of_second);
    products.template end<0, 1>(first);
    first_maxima[0] = lane_maxima(first);
    ptx::pin_registers(first_maxima);  // now, not after the wait
    products.template end<1, 0>(second);
    keep(block, first_maxima[0], lane_maxima(second));
  }
  const auto hide = [&](std::uint32_t(&scores)[32], const Strip& strip) {
    if (block < strip.whole_blocks) return;
    const int row = strip.first_row + 16 * warp + lane / 4;
    const int seen[2] = {shape.seen(row) - block * kBlockKeys, shape.seen(row + 8) - block * kBlockKeys};
    hide_keys(scores, seen, lane);
  };
  // The others.
  const int blocks = kStrips == 2 ? max(own[0].blocks, own[kStrips - 1].blocks) : own[0].blocks;
#pragma unroll 1
  for (; block < blocks; ++block) {
    products.template begin<0>(first, queries[0]);
    if constexpr (kStrips == 2) {
      products.template begin<1>(second, queries_of_second);
      products.template end<0, 1>(first);
      hide(first, own[0]);
      first_maxima[0] = lane_maxima(first);
      ptx::pin_registers(first_maxima);
      products.template end<1, 0>(second);
      hide(second, own[1]);
      keep(block, first_maxima[0], lane_maxima(second));
    } else {
      products.template end<0, 0>(first);
      hide(first, own[0]);
      const std::uint32_t maxima = quad_maxima(lane_maxima(first));
      best = ptx::max_halves(best, maxima);
      if (lane % 4 == 0) tops[block * kScreenWords + word] = maxima;
    }
  }
  // Blocks that only other warpgroups need.
  for (; block < steps; ++block) products.skip();
  if (unit >= units) return;
  if constexpr (kStrips == 1) best = ptx::max_halves(best, __shfl_xor_sync(0xFFFFFFFFu, best, 1));
  if (lane % 4 < kStrips) shared.best[consumer * kStrips + lane % 4][word] = best;
  ptx::barrier_sync(1 + consumer, ptx::kWarpgroupThreads);
#pragma unroll 1
  for (int i = 0; i < kStrips && first_strip + i < strips; ++i) {
    const std::int64_t row = static_cast<std::int64_t>(batch * shape.heads + head) * strips + first_strip + i;
    write_distances(shape, strip_of(shape, first_strip + i), tops + i * tops_of_strip,
                    shared.best[consumer * kStrips + i], shared.margins[consumer * kStrips + i], warp, lane,
                    arrays.distances + row * shape.blocks());
  }
}

}  // namespace adaattn::cuda::sm90
