// Attention of 64 probe rows, 16 a warp, over blocks of keys in shared memory, by a warpgroup.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/common/ptx/arithmetic.cuh"
#include "cuda/common/ptx/wgmma_rs.cuh"
#include "cuda/sm90/adaptive/tile16.cuh"

namespace adaattn::cuda::sm90 {

// kSpan: keys whose scores are in registers at a time.
template <int kDim, int kSpan, typename T>
struct ProbeRows {
  std::uint32_t q[kDim / 4];  // operand a, of steps of 16 columns
  float out[kDim / 2];        // accumulators: sum of 2^(score - top) v
  float top[2], sum[2];       // of rows lane / 4 and 8 on
  int seen[2];                // keys that the row sees
  int least_seen;             // by rows of the warp
  int most_seen;              // by rows of the warpgroup

  __device__ __forceinline__ void load(const AdaptiveShape& shape, const HeadRows& from, int first, int lane) {
#pragma unroll
    for (float& x : out) x = 0;
    const std::uint16_t* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = probe_row(first + lane / 4 + half * 8, shape.queries);
      rows[half] = from.row(query);
      seen[half] = shape.seen(query);
      top[half] = -INFINITY;
      sum[half] = 0;
    }
    least_seen = shape.seen(probe_row(first, shape.queries));
    most_seen = shape.seen(probe_row(first / 64 * 64 + 63, shape.queries));
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = step * 16 + i / 2 * 8 + lane % 4 * 2;
        q[step * 4 + i] = column < shape.dim_qk ? __ldg(reinterpret_cast<const unsigned*>(rows[i % 2] + column)) : 0;
      }
  }

  // Adds the kSpan keys of a block, in panels, from row `span` on; begin: the first of them. masses: of rows lane / 4
  // and 8 on.
  __device__ __forceinline__ void add(ptx::WgmmaOperand<0> k, ptx::WgmmaOperand<kBlockKeys * 128> v, int span,
                                      int begin, float scale, int lane, Mass (&masses)[2]) {
    constexpr int kTiles = kSpan / 8;
    float scores[kTiles * 4];
    ptx::pin_registers(scores);
    ptx::pin_registers(q);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      ptx::wgmma_rs<T, false>(scores, q + step * 4, k.at((step / 4 * kBlockKeys + span) * 128 + step % 4 * 32),
                              step > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    if (begin + kSpan > least_seen) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (begin + t * 8 + lane % 4 * 2 + e % 2 >= seen[e / 2]) scores[t * 4 + e] = -INFINITY;
    }

    float lower[2];  // what scales this span's probabilities to the chunk's top
    bool higher = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float span_top = scores[half * 2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        span_top = fmaxf(span_top, fmaxf(scores[t * 4 + half * 2], scores[t * 4 + half * 2 + 1]));
      span_top = fmaxf(span_top, __shfl_xor_sync(0xFFFFFFFFU, span_top, 1));
      span_top = fmaxf(span_top, __shfl_xor_sync(0xFFFFFFFFU, span_top, 2)) * scale;
      const float base = span_top == -INFINITY ? 0.0F : span_top;
      float span_sum = 0;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; ++e) {
          scores[t * 4 + e] = ptx::exp2_fast(fmaf(scores[t * 4 + e], scale, -base));
          span_sum += scores[t * 4 + e];
        }
      span_sum += __shfl_xor_sync(0xFFFFFFFFU, span_sum, 1);
      span_sum += __shfl_xor_sync(0xFFFFFFFFU, span_sum, 2);
      masses[half] = {span_top, span_sum};

      const float new_top = fmaxf(top[half], span_top), new_base = new_top == -INFINITY ? 0.0F : new_top;
      const float fades = ptx::exp2_fast(top[half] - new_base);
      lower[half] = ptx::exp2_fast(span_top - new_base);
      higher = higher || (new_top > top[half] && top[half] > -INFINITY);
      sum[half] = sum[half] * fades + span_sum * lower[half];
      top[half] = new_top;
      if (__any_sync(0xFFFFFFFFU, higher))
#pragma unroll
        for (int t = 0; t < kDim / 8; ++t) out[t * 4 + half * 2] *= fades, out[t * 4 + half * 2 + 1] *= fades;
    }

    std::uint32_t p[kSpan / 4];
#pragma unroll
    for (int i = 0; i < kSpan / 4; ++i)
      p[i] = ptx::pack<T>(scores[i * 2] * lower[i % 2], scores[i * 2 + 1] * lower[i % 2]);
    ptx::pin_registers(out);
    ptx::pin_registers(p);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSpan / 16; ++step)
      ptx::wgmma_rs<T>(out, p + step * 4, v.at((span + step * 16) * 128), 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin_registers(out);
  }
};

// Of two sets of keys together.
__device__ __forceinline__ Mass merge(Mass a, Mass b) {
  const float top = fmaxf(a.top, b.top), base = top == -INFINITY ? 0.0F : top;
  return {top, a.sum * ptx::exp2_fast(a.top - base) + b.sum * ptx::exp2_fast(b.top - base)};
}

}  // namespace adaattn::cuda::sm90
