// Tile sizes of the forward kernel with 8-bit scores and 16-bit values, its shared-memory plan, and its parameters.
//
// q = q_scale q8 per query, k = mean + tile scale k8 per kKeys keys: a score to base 2 is s x q_scale x tile scale x
// scale / ln 2, s = q8 k8 exact, plus what the mean adds to all scores of a row alike. Probabilities are relative to a
// reference that is known before any score: none where no score can reach 2^kMostExponent, else the most that a score
// can be, by the norms of the bytes, less that. bfloat16 and float32 sums have the range.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "cuda/sm90/forward/tile_plan.h"

namespace adaattn::cuda::sm90 {

struct Int8Tile {
  int dim;        // head size, padded with zeros to 64 or 128
  int consumers;  // warpgroups of 64 rows each
  int keys;       // keys of one step, which share a scale
  int stages;     // K and V blocks in flight
};

template <Int8Tile kTile>
struct Int8Config {
  static constexpr int kDim = kTile.dim, kConsumers = kTile.consumers, kKeys = kTile.keys, kStages = kTile.stages;
  // One chunk of values more: ones, which sum the probabilities. 8 of its columns are multiplied.
  static constexpr int kChunks = kDim / 64, kStoredChunks = kChunks + 1;
  static constexpr int kOutputs = kDim / 2 + 4;  // accumulators a thread
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers >= 3 ? 32 : 40;
  static constexpr int kLeftRegisters = (kLaunchRegisters * kThreads - 128 * kProducerRegisters) / (128 * kConsumers);
  static constexpr int kConsumerRegisters = kLeftRegisters > 240 ? 240 : kLeftRegisters / 8 * 8;
  static constexpr int kBlocks = 1;                      // for tile_plan.h and grid.h,
  static constexpr bool kPacks = false, kParts = false;  // and these
};

struct alignas(16) KeyTile {
  float scale;
  float norm;  // largest norm of a key's bytes, times scale
  float unused[2];
};

// Of a query: what its probabilities are relative to, and the score with the mean key, to base 2. Kept in shared
// memory, for registers are scarce. The reference is NaN where the query, or a key of the head, is not finite.
struct QueryRow {
  float reference, shift;
};

constexpr float kMostExponent = 60.0f;

template <typename Config>
struct Int8Shared {
  alignas(1024) std::uint8_t q[Config::kConsumers][64][Config::kDim];
  alignas(1024) std::uint8_t k[Config::kStages][Config::kKeys][Config::kDim];
  alignas(1024) std::uint16_t v[Config::kStages][Config::kStoredChunks][Config::kKeys][64];
  alignas(128) KeyTile tile[Config::kStages];
  QueryRow rows[Config::kConsumers][64];
  std::uint64_t plan_full[Config::kConsumers], plan_empty[Config::kConsumers];
  std::uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  std::uint64_t v_full[Config::kStages], v_empty[Config::kStages];
  TilePlan plan[2][Config::kConsumers];    // see ForwardShared
  unsigned failed[2][Config::kConsumers];  // not 0: the tile in this place has to be done again
};

struct Int8Params {
  CUtensorMap k, v;  // [row of all heads, byte], [batch, head, token, dim]
  TileGrid grid;
  const std::uint16_t* q;  // [batch, heads, query_count, dim_qk]
  std::int64_t q_stride[3];
  int dim_qk, dim_v, padded_keys;
  bool bfloat16;          // q and out are, else float16
  float scale_log2;       // scale / ln 2; > 0
  const KeyTile* tiles;   // [batch, key heads, padded_keys / kKeys]
  const float* key_mean;  // [batch, key heads, kDim]
  void* out;              // [batch, heads, query_count, dim_v]
  std::int64_t out_stride[3];
  float* lse;           // [batch, heads, query_count] or null
  unsigned* next_item;  // as in ForwardParams
};

}  // namespace adaattn::cuda::sm90
