// Tile sizes of the sm_90a backward kernel, its shared-memory plan, and its parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/visibility.h"

namespace adaattn::cuda::sm90 {

// One block of threads works on 128 keys: a producer warpgroup that copies, and two consumers of 64 keys each, which
// visit the queries kQueries at a time. They split the product for dQ by head dimension, or by query if D is 64.
template <int kDim_, int kQueries_, bool kEarlyValues_, bool kOrdered_, bool kLate_ = false, bool kTurns_ = false>
struct BackwardConfig {
  static constexpr int kDim = kDim_;  // head size, padded with zeros to 64 or 128
  static constexpr int kQueries = kQueries_;
  // Starts the product for dV before dS is computed: more overlap, more registers.
  static constexpr bool kEarlyValues = kEarlyValues_;
  // Adds to each tile of dQ in one order, so that the same inputs give the same bits.
  static constexpr bool kOrdered = kOrdered_;
  // Makes dQ one step late, so that the consumers need not meet (handover.cuh).
  static constexpr bool kLate = kLate_;
  // The consumers start their products in turns.
  static constexpr bool kTurns = kTurns_;
  static_assert(kLate || !kTurns, "consumers that meet cannot take turns");
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;          // Q and dO blocks in flight
  static constexpr int kChunks = kDim / 64;  // a swizzled row of shared memory is 64 elements, 128 bytes
  static constexpr int kThreads = 384;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kSharedQueries = kQueries * kDim / 128;  // rows of dQ (64 columns each) that a consumer makes
};

// The same keys, but a warpgroup makes dQ alone and has one thread copy; the consumers do not meet (split.cuh). Its
// registers are what the launch gives three warpgroups, 504 a thread of each, less the consumers' ones.
template <int kDim_, int kQueries_>
struct SplitConfig {
  static constexpr int kDim = kDim_, kQueries = kQueries_;
  static constexpr bool kOrdered = false;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 3;
  static constexpr int kChunks = kDim / 64;
  static constexpr int kThreads = 384;
  static constexpr int kSumsRegisters = 88, kConsumerRegisters = 208;
  static constexpr int kSharedQueries = kQueries * kDim / 128;
  static_assert(kChunks == 1, "dQ of all queries and 64 columns is one product");
};

// What one block of threads does: all queries of one key head's group that see its keys.
struct KeyPlan {
  int first_key, key_head, batch;
  int key_count;             // keys of this batch entry
  int first_tile, tiles;     // of queries, per query head
  int full_begin, full_end;  // queries in [full_begin, full_end) see all keys of the block
};

template <typename Config>
struct BackwardShared {
  using Element = std::uint16_t;
  alignas(1024) Element k[Config::kChunks][Config::kKeys][64];
  alignas(1024) Element v[Config::kChunks][Config::kKeys][64];
  alignas(1024) Element q[Config::kStages][Config::kChunks][Config::kQueries][64];
  alignas(1024) Element dout[Config::kStages][Config::kChunks][Config::kQueries][64];
  // Two buffers: the barrier that says that one is full also says that the other has been read.
  alignas(1024) Element ds[2][Config::kKeys / 64][Config::kQueries][64];
  alignas(128) float dq[2][64 * Config::kSharedQueries];         // each consumer's, in the order of its registers
  alignas(16) float rows[Config::kStages][2][Config::kQueries];  // lse / ln 2, delta
  std::uint64_t k_full, v_full;
  std::uint64_t q_full[Config::kStages], q_empty[Config::kStages];
  std::uint64_t dout_full[Config::kStages], dout_empty[Config::kStages];
  std::uint64_t ds_full[2], ds_empty[2];  // where dQ is late
  std::uint64_t dq_full[2], dq_empty[2];
  KeyPlan plan;
};

template <typename Config>
struct SplitShared {
  using Element = std::uint16_t;
  alignas(1024) Element k[Config::kChunks][Config::kKeys][64];
  alignas(1024) Element v[Config::kChunks][Config::kKeys][64];
  alignas(1024) Element q[Config::kStages][Config::kChunks][Config::kQueries][64];
  alignas(1024) Element dout[Config::kStages][Config::kChunks][Config::kQueries][64];
  alignas(1024) Element ds[2][Config::kKeys / 64][Config::kQueries][64];
  alignas(128) float dq[Config::kQueries * Config::kDim];  // in the order of registers
  alignas(16) float rows[Config::kStages][2][Config::kQueries];
  std::uint64_t k_full, v_full;
  std::uint64_t q_full[Config::kStages], dout_full[Config::kStages], empty[Config::kStages];
  std::uint64_t ds_empty[2];
  KeyPlan plan;
};

struct BackwardParams {
  CUtensorMap q, k, v, dout_blocks;  // [batch, head, token, dim], boxes of 64 columns
  const void *out, *dout;            // [batch, heads, query_count, dim_v]
  std::int64_t out_stride[3], dout_stride[3];
  const float* lse;  // [batch, heads, query_count]
  float* rows;       // [batch, heads, query_tiles, 2, kQueries]: lse / ln 2 and delta of each query
  float* sums;       // [batch, heads, query_tiles, 2, ...]: dQ / scale in the order of the consumers' registers
  void *dq, *dk, *dv;
  std::int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  const std::int64_t* key_lengths;  // [batch] or null
  unsigned* order;                  // null, or what makes the sums deterministic: a ticket counter, then how many
                                    // blocks have added, [batch, heads, query_tiles, 2] (order.cuh)
  bool adds;                        // false if one block of keys makes all of dQ: nothing to zero or to add to
  float scale, scale_log2;          // scale / ln 2
  int batch, heads, group;          // group: query heads on one key head
  int query_count, key_count, dim, dim_v;
  Visibility visibility;  // of batch entries without a key length; the diagonal of others moves with their length
  bool bottom_right;
  int key_tiles, query_tiles;  // per head
  int heads_at_once;           // so many key heads are worked on side by side, their longest blocks first
};

}  // namespace adaattn::cuda::sm90
