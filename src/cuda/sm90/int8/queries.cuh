// A consumer makes bytes of its 64 queries.
#pragma once

#include "cuda/common/ptx/warpgroup.cuh"
#include "cuda/sm90/int8/bytes.cuh"
#include "cuda/sm90/int8/config.h"

namespace adaattn::cuda::sm90 {

// Of a thread's two rows: what turns s x tile scale into a score to base 2. NaN where a query is not finite.
struct RowScales {
  float scale[2];
};

// Where a byte of a consumer's queries lies, by the products' swizzle.
template <int kDim>
__device__ __forceinline__ std::uint32_t swizzled(std::uint32_t offset) {
  return offset ^ (kDim == 128 ? (offset >> 7 & 7) << 4 : (offset >> 7 & 3) << 4);
}

// Two threads share a row: what a thread computes is of row thread / 2, what it returns of the rows that it has in
// products. A warp writes the bytes, and what else is known of the queries, of the rows that are its own in products.
template <typename Config>
__device__ __forceinline__ RowScales quantize_queries(const Int8Params& params, std::uint8_t (&to)[64][Config::kDim],
                                                      QueryRow (&query_rows)[64], const TilePlan& plan,
                                                      int first_query) {
  constexpr int kPieces = Config::kDim / 16, kHalf = Config::kDim / 2;  // pieces of 8 elements, of half a row
  const int thread = ptx::thread_in_warpgroup(), row = thread / 2, half = thread % 2, lane = thread % 32;
  const int query = first_query + row;
  const int key_head = plan.batch * (params.grid.heads / params.grid.group) + plan.key_head;
  const std::uint16_t* from = params.q + plan.batch * params.q_stride[0] + plan.head * params.q_stride[1] +
                              query * params.q_stride[2] + half * kHalf;
  uint4 pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    pieces[i] = query < params.grid.query_count && half * kHalf + 8 * i < params.dim_qk
                    ? reinterpret_cast<const uint4*>(from)[i]
                    : make_uint4(0, 0, 0, 0);
  const int tiles = params.padded_keys / Config::kKeys;
  unsigned key_norm = 0;
  for (int i = lane; i < tiles; i += 32)
    key_norm = max(key_norm, __float_as_uint(params.tiles[static_cast<std::int64_t>(key_head) * tiles + i].norm));
  key_norm = __reduce_max_sync(0xFFFFFFFFu, key_norm);

  unsigned largest = 0;
  float shift = 0.0f;
  const float* mean = params.key_mean + static_cast<std::int64_t>(key_head) * Config::kDim + half * kHalf;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const Eight eight = load_eight(reinterpret_cast<const std::uint16_t*>(&pieces[i]), params.bfloat16);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = max(largest, magnitude(eight.value[j]));
    if (params.lse != nullptr)
      for (int j = 0; j < 8; ++j) shift = fmaf(eight.value[j], mean[8 * i + j], shift);
  }
  largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
  const float scale = scale_of_magnitude(largest), inverse = 1.0f / scale;
  float squares = 0.0f;
  const auto base = static_cast<std::uint32_t>(__cvta_generic_to_shared(&to[0][0]));
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    std::uint32_t words[4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Eight eight = load_eight(reinterpret_cast<const std::uint16_t*>(&pieces[2 * i + part]), params.bfloat16);
      float rounded[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        rounded[j] = fmaf(eight.value[j], inverse, kRounder);
        squares = fmaf(rounded[j] - kRounder, rounded[j] - kRounder, squares);
      }
      words[2 * part] = low_bytes(rounded[0], rounded[1], rounded[2], rounded[3]);
      words[2 * part + 1] = low_bytes(rounded[4], rounded[5], rounded[6], rounded[7]);
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     base + swizzled<Config::kDim>(row * Config::kDim + half * kHalf + 16 * i)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
  squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 1);
  shift += __shfl_xor_sync(0xFFFFFFFFu, shift, 1);
  // A product of scales that is too small for a normal number would lose its NaN, too.
  const float to_log2 = fmaxf(scale * params.scale_log2, 0x1p-126f) + (scale - scale);
  const float bound = sqrtf(squares) * __uint_as_float(key_norm) * to_log2 * 1.00001f;  // Cauchy-Schwarz
  const float reference = bound <= kMostExponent ? 0.0f : bound - kMostExponent;
  if (half == 0) query_rows[row] = {.reference = reference, .shift = shift * params.scale_log2};
  __syncwarp();
  RowScales result;
#pragma unroll
  for (int i = 0; i < 2; ++i) result.scale[i] = __shfl_sync(0xFFFFFFFFu, to_log2, 2 * (lane / 4) + 16 * i);
  return result;
}

}  // namespace adaattn::cuda::sm90
