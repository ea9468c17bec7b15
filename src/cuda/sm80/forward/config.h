// Tile sizes of the sm_80 forward kernel, its shared-memory plan, and its parameters.
#pragma once

#include <cstdint>

#include "common/visibility.h"
#include "cuda/sm80/mask_view.h"
#include "cuda/sm80/matrix_view.h"
#include "cuda/sm80/reach.h"

namespace adaattn::cuda::sm80 {

// One block of threads works on kQueries rows, 16 kStrips of them in each warp.
template <int kDim_, int kWarps_, int kStrips_, int kKeys_, int kSlots_, int kBlocks_, bool kKeepQueries_>
struct ForwardConfig {
  static constexpr int kDim = kDim_;  // head size, padded with zeros to 64, 128 or 256
  static constexpr int kWarps = kWarps_;
  static constexpr int kStrips = kStrips_;  // a key's operand serves so many products of 16 rows
  static constexpr int kKeys = kKeys_;      // keys of one step
  static constexpr int kSlots = kSlots_;    // tiles of keys or of values in shared memory
  static constexpr int kBlocks = kBlocks_;  // blocks of threads that share a multiprocessor's registers
  static constexpr int kGeneralBlocks = kBlocks < 2 ? kBlocks : 2;  // masks and statistics take more registers
  static constexpr bool kKeepQueries = kKeepQueries_;  // in registers; else they are read from shared memory each step
  static constexpr int kQueries = 16 * kStrips * kWarps;
  static constexpr int kThreads = 32 * kWarps;
};

// A tile of queries and the blocks of keys that it meets. Plans stay in shared memory: registers are scarce.
struct TilePlan {
  int first_query, head, batch;
  int steps;         // key blocks to visit
  int window_steps;  // the first so many go down from block_end - 1, the others down from sink_blocks - 1
  int block_end, sink_blocks;
  Reach reach;
  const void *q, *k, *v;            // of the head, [token, dim]
  std::int64_t k_stride, v_stride;  // of a token
};

// What one warp's rows do with the tile's blocks of keys.
struct WarpPlan {
  int begin, end, sink_end;  // blocks outside of [begin, end) and [0, sink_end) hold no key that these rows see
  int full_begin, full_end;  // blocks in [full_begin, full_end) are seen whole by every row
};

template <typename Config>
struct ForwardShared {
  using Element = std::uint16_t;
  alignas(128) Element q[Config::kQueries][Config::kDim];
  alignas(128) Element slots[Config::kSlots][Config::kKeys][Config::kDim];
  TilePlan plan;
  WarpPlan warps[Config::kWarps];
};

struct ForwardParams {
  MatrixView q, k, v, out;
  float *lse, *entropy, *max_probability;  // [batch, heads, query_count] or null
  const std::int64_t* key_lengths;         // [batch] or null
  MaskView mask;
  float scale_log2;         // scale / ln 2; > 0 without a mask or statistics
  int batch, heads, group;  // group: query heads on one key head
  int query_count, key_count, dim, dim_v;
  Visibility visibility;  // of batch entries without a key length; the diagonal of others moves with their length
  bool bottom_right;
  int tiles_per_head, heads_at_once;  // heads_at_once heads are worked on side by side, their longest tiles first
};

}  // namespace adaattn::cuda::sm80
