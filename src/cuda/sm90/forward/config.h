// Tile sizes of the sm_90a forward kernel, its shared-memory plan, and its parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/visibility.h"

namespace adaattn::cuda::sm90 {

// One block of threads works on kQueries rows: a producer warpgroup that copies, and consumers of 64 rows each.
template <int kDim_, int kConsumers_, int kKeys_, int kStages_>
struct ForwardConfig {
  static constexpr int kDim = kDim_;  // head size, padded with zeros to 64, 128 or 256
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kKeys = kKeys_;      // keys of one step
  static constexpr int kStages = kStages_;  // K and V blocks in flight
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kChunks = kDim / 64;  // a swizzled row of shared memory is 64 elements, 128 bytes
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // All of a multiprocessor's 65,536 registers, most of them for the accumulators.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  // Consumers start their products in turns. With few keys a step the turns cost more than they order.
  static constexpr bool kTakeTurns = kDim == 64 || kKeys > 128;
};

// What the producer tells the consumers about a tile of queries: which key blocks it meets.
struct TilePlan {
  int first_query, head, batch;  // head counts within the batch; first_query < 0: no more work
  int key_count;                 // keys of this batch entry
  int steps;                     // key blocks to visit
  int window_steps;              // the first so many go down from block_end - 1, the others down from sink_blocks - 1
  int block_end, sink_blocks;
};

template <typename Config>
struct ForwardShared {
  using Element = std::uint16_t;
  alignas(1024) Element q[Config::kChunks][Config::kQueries][64];
  alignas(1024) Element k[Config::kStages][Config::kChunks][Config::kKeys][64];
  alignas(1024) Element v[Config::kStages][Config::kChunks][Config::kKeys][64];
  std::uint64_t q_full, q_empty;  // q_full also guards the plan
  std::uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  std::uint64_t v_full[Config::kStages], v_empty[Config::kStages];
  TilePlan plan;
};

struct ForwardParams {
  CUtensorMap q, k, v;  // [batch, head, token, dim], boxes of 64 columns
  void* out;            // [batch, heads, query_count, dim_v]
  std::int64_t out_stride[3];
  float* lse;                       // [batch, heads, query_count] or null
  const std::int64_t* key_lengths;  // [batch] or null
  unsigned* next_tile;              // counter that starts at 0: blocks take tiles as they get free; null: in turn
  float scale_log2;                 // scale / ln 2, > 0
  int batch, heads, group;          // group: query heads on one key head
  int query_count, key_count, dim_v;
  Visibility visibility;  // of batch entries without a key length; the diagonal of others moves with their length
  bool bottom_right;
  int tiles_per_head, heads_at_once;  // heads_at_once heads are worked on side by side, their longest tiles first
};

}  // namespace adaattn::cuda::sm90
