// Exact attention, forward, for sm_80 and later: warp-level products, keys and values copied ahead by cp.async.
//
// Each warp keeps its query rows, their output and their softmax in registers (FlashAttention-2's division of work,
// arXiv 2307.08691). Tiles of keys and of values come in turns through one ring of slots in shared memory: while one is
// used, the others are on their way. Blocks of threads on the same multiprocessor hide each other's softmax.
#pragma once

#include "cuda/common/ptx/mma.cuh"
#include "cuda/sm80/forward/config.h"
#include "cuda/sm80/forward/epilogue.cuh"
#include "cuda/sm80/forward/schedule.cuh"
#include "cuda/sm80/forward/softmax.cuh"
#include "cuda/sm80/mask.cuh"
#include "cuda/sm80/tiles.cuh"

namespace adaattn::cuda::sm80 {

enum class Part { kKeys, kValues };

// The tiles of a plan, keys and values of its blocks in turn, as they pass through the slots.
template <typename T, typename Config>
class TileRing {
 public:
  static constexpr int kAhead = Config::kSlots - 1;  // tiles on their way while one is used

  __device__ __forceinline__ TileRing(const ForwardParams& params, const ForwardShared<Config>& shared)
      : params_(params), shared_(shared) {}

  // Starts the first tiles' copies; what was started before belongs to the first.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy(static_cast<Part>(i % 2), i / 2, i);
  }

  // Waits for the next tile, which is that part of the step's block; starts a later one's copy to the slot of the tile
  // before, which all warps have used by now.
  template <Part kPart>
  __device__ __forceinline__ std::uint32_t take(int step) {
    constexpr int kNext = static_cast<int>(kPart) + kAhead;
    ptx::wait_copies<kAhead - 1>();
    __syncthreads();
    copy(static_cast<Part>(kNext % 2), step + kNext / 2, slot_ == 0 ? kAhead : slot_ - 1);
    const std::uint32_t tile = address(slot_);
    slot_ = slot_ == kAhead ? 0 : slot_ + 1;
    return tile;
  }

 private:
  __device__ __forceinline__ std::uint32_t address(int slot) const {
    return ptx::shared_address(shared_.slots[0]) + slot * static_cast<std::uint32_t>(sizeof(shared_.slots[0]));
  }
  __device__ __forceinline__ void copy(Part part, int step, int slot) {
    const TilePlan& plan = shared_.plan;
    if (step < plan.steps) {
      const bool keys = part == Part::kKeys;
      copy_tile<Config::kKeys, Config::kDim, Config::kThreads>(
          address(slot), static_cast<const T*>(keys ? plan.k : plan.v), keys ? plan.k_stride : plan.v_stride,
          block_of_step(plan, step) * Config::kKeys, plan.reach.key_count, keys ? params_.dim : params_.dim_v);
    }
    ptx::commit_copies();
  }

  const ForwardParams& params_;
  const ForwardShared<Config>& shared_;
  int slot_ = 0;
};

// A warp's query rows as operands: kept in registers, or loaded from shared memory whenever they are needed.
template <typename Config>
class QueryRows {
 public:
  __device__ __forceinline__ explicit QueryRows(std::uint32_t rows) : rows_(rows) {}
  __device__ __forceinline__ void load() {
    if constexpr (Config::kKeepQueries)
#pragma unroll
      for (int i = 0; i < Config::kDim / 16; ++i)
#pragma unroll
        for (int strip = 0; strip < Config::kStrips; ++strip) ptx::load_matrices(kept_[i][strip], rows_.at(strip, i));
  }
  __device__ __forceinline__ void get(std::uint32_t (&to)[Config::kStrips][4], int column_block) const {
#pragma unroll
    for (int strip = 0; strip < Config::kStrips; ++strip)
      if constexpr (Config::kKeepQueries)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[strip][i] = kept_[column_block][strip][i];
      else
        ptx::load_matrices(to[strip], rows_.at(strip, column_block));
  }

 private:
  RowsFirst<Config::kDim> rows_;
  std::uint32_t kept_[Config::kKeepQueries ? Config::kDim / 16 : 1][Config::kStrips][4];
};

template <typename Config>
using Scores = float[Config::kStrips][Config::kKeys / 2];
template <typename Config>
using Output = float[Config::kStrips][Config::kDim / 2];

// scores = q k^T
template <typename T, typename Config>
__device__ __forceinline__ void multiply_queries(Scores<Config>& scores, const QueryRows<Config>& q,
                                                 std::uint32_t keys) {
  const ColumnsFirst<Config::kDim> k(keys);
#pragma unroll
  for (int strip = 0; strip < Config::kStrips; ++strip)
#pragma unroll
    for (float& score : scores[strip]) score = 0.0f;
#pragma unroll
  for (int i = 0; i < Config::kDim / 16; ++i) {
    std::uint32_t a[Config::kStrips][4];
    q.get(a, i);
#pragma unroll
    for (int j = 0; j < Config::kKeys / 16; ++j) {
      std::uint32_t b[4];
      ptx::load_matrices(b, k.at(j, i));
#pragma unroll
      for (int strip = 0; strip < Config::kStrips; ++strip) {
        ptx::multiply_add<T>(scores[strip] + 8 * j, a[strip], b);
        ptx::multiply_add<T>(scores[strip] + 8 * j + 4, a[strip], b + 2);
      }
    }
  }
}

// out += p v, with p rounded to T.
template <typename T, typename Config>
__device__ __forceinline__ void multiply_values(Output<Config>& out, const Scores<Config>& p, std::uint32_t values) {
  const RowsFirst<Config::kDim> v(values);
#pragma unroll
  for (int j = 0; j < Config::kKeys / 16; ++j) {
    std::uint32_t a[Config::kStrips][4];
#pragma unroll
    for (int strip = 0; strip < Config::kStrips; ++strip)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[strip][i] = ptx::pack<T>(p[strip][8 * j + 2 * i], p[strip][8 * j + 2 * i + 1]);
#pragma unroll
    for (int i = 0; i < Config::kDim / 16; ++i) {
      std::uint32_t b[4];
      ptx::load_matrices_transposed(b, v.at(j, i));
#pragma unroll
      for (int strip = 0; strip < Config::kStrips; ++strip) {
        ptx::multiply_add<T>(out[strip] + 8 * i, a[strip], b);
        ptx::multiply_add<T>(out[strip] + 8 * i + 4, a[strip], b + 2);
      }
    }
  }
}

// Scores of 16 rows become units of log2, with the mask's terms if there are any.
template <typename T, int kCount>
__device__ __forceinline__ void add_mask(float (&scores)[kCount], const ForwardParams& params, const TilePlan& plan,
                                         int first_row, int first_key) {
  constexpr float kLog2e = 1.4426950408889634f;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int query = first_row + 8 * row;
    const bool masked = params.mask.data != nullptr && query < params.query_count;
    const std::int64_t at = mask_offset(params.mask, plan.batch, plan.head, query, first_key);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      float& score = scores[4 * (i / 2) + 2 * row + i % 2];
      const int key = 8 * (i / 2) + i % 2;
      const float term = masked && first_key + key < plan.reach.key_count
                             ? mask_term<T>(params.mask, at + key * params.mask.stride[3])
                             : 0.0f;
      score = term == -INFINITY ? term : fmaf(score, params.scale_log2, term * kLog2e);
    }
  }
}

// kGeneral: with a mask tensor, entropy, max_probability, or a scale that is not positive.
template <typename T, typename Config, bool kGeneral>
__global__ void __launch_bounds__(Config::kThreads, kGeneral ? Config::kGeneralBlocks : Config::kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<Config>*>(memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread < 32) {
    const TilePlan made = plan_tile<Config>(params, static_cast<int>(blockIdx.x));
    if (thread == 0) shared.plan = made;
    if (thread < Config::kWarps) shared.warps[thread] = plan_warp<Config>(made, thread);
  }
  __syncthreads();
  const TilePlan& plan = shared.plan;
  const WarpPlan& warp_plan = shared.warps[warp];
  const auto first_row = [&] { return plan.first_query + 16 * Config::kStrips * warp + lane / 4; };
  const float scale_log2 = kGeneral ? 1.0f : params.scale_log2;

  Output<Config> out;
  RowState state[Config::kStrips];
#pragma unroll
  for (int strip = 0; strip < Config::kStrips; ++strip)
#pragma unroll
    for (float& value : out[strip]) value = 0.0f;

  if (plan.steps > 0) {
    copy_tile<Config::kQueries, Config::kDim, Config::kThreads>(ptx::shared_address(shared.q),
                                                                static_cast<const T*>(plan.q), params.q.stride[2],
                                                                plan.first_query, params.query_count, params.dim);
    TileRing<T, Config> ring(params, shared);
    ring.start();
    QueryRows<Config> queries(ptx::shared_address(shared.q[16 * Config::kStrips * warp]));

#pragma unroll 1
    for (int step = 0; step < plan.steps; ++step) {
      Scores<Config> scores;
      const std::uint32_t keys = ring.template take<Part::kKeys>(step);
      if (step == 0) queries.load();
      const int block = block_of_step(plan, step);
      const bool seen = block < warp_plan.end && (block >= warp_plan.begin || block < warp_plan.sink_end);
      if (seen) {
        multiply_queries<T, Config>(scores, queries, keys);
        const bool whole = block >= warp_plan.full_begin && block < warp_plan.full_end;
        const int first_key = block * Config::kKeys + 2 * (lane % 4);
        float correction[Config::kStrips][2];
#pragma unroll
        for (int strip = 0; strip < Config::kStrips; ++strip) {
          if constexpr (kGeneral) add_mask<T>(scores[strip], params, plan, first_row() + 16 * strip, first_key);
          if (!whole) hide(scores[strip], plan.reach, first_row() + 16 * strip, first_key);
          exponentiate<kGeneral>(scores[strip], state[strip], correction[strip], scale_log2);
        }
        // Once a row has met its largest scores, its factor is exactly 1 for most blocks.
#pragma unroll
        for (int strip = 0; strip < Config::kStrips; ++strip)
          if (__any_sync(0xFFFFFFFFu, correction[strip][0] != 1.0f || correction[strip][1] != 1.0f))
#pragma unroll
            for (int i = 0; i < Config::kDim / 2; ++i) out[strip][i] *= correction[strip][i / 2 % 2];
      }
      const std::uint32_t values = ring.template take<Part::kValues>(step);
      if (seen) multiply_values<T, Config>(out, scores, values);
    }
  }
#pragma unroll
  for (int strip = 0; strip < Config::kStrips; ++strip)
    store_strip<T, kGeneral>(params, plan, first_row() + 16 * strip, out[strip], state[strip], scale_log2);
}

}  // namespace adaattn::cuda::sm80
