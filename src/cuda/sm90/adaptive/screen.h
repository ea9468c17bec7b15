// The screen of the adaptive engine: the best screened score of each block of keys for each 64 queries.
//
// Scores are e4m3 (q z) times e4m3 (k y), 32 products added up in float16: one tensor instruction of the highest rate
// for 64 queries and 128 keys. A block's distance decides whether it is looked at, no more, and eight bits suffice.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/adaptive/shape.h"

namespace adaattn::cuda::sm90 {

constexpr int kScreenBlockBytes = kBlockKeys * kScreenRank;

// Where the product of key and column (< kScreenRank) lies in its key head's k8: such that a block is an operand of the
// tensor cores as it is (core matrices of 8 keys by 16 columns).
constexpr std::int64_t screened_key_offset(int key, int column) {
  const int in_block = key % kBlockKeys;
  return static_cast<std::int64_t>(key / kBlockKeys) * kScreenBlockBytes + column / 16 * (kScreenBlockBytes / 2) +
         in_block / 8 * 128 + in_block % 8 * 16 + column % 16;
}

// Fills distances of all query heads whose key head's energy reaches kLeastScreenEnergy and that is finite so far;
// marks key heads some q of which is not finite. Reads q, z, k8, energy and not_finite; at most kMostBlocks blocks. The
// device must be current. Throws StatusError if the launch fails.
void launch_screen(const AdaptiveShape& shape, Rows16 q, const AdaptiveArrays& arrays, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
