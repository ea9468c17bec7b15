// Tile sizes of the sm_90a forward kernel, its shared-memory plan, and its parameters.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/sm90/forward/tile_plan.h"

namespace adaattn::cuda::sm90 {

// What an instance of the kernel is made for.
struct ForwardTile {
  int dim;             // head size, padded with zeros to 64, 128 or 256
  int consumers;       // warpgroups of 64 rows each
  int keys;            // keys of one step
  int stages;          // K and V blocks in flight
  int blocks = 1;      // blocks of threads on a multiprocessor
  bool packs = false;  // heads of a group can share a tile
  bool parts = false;  // tiles can be worked on in parts
  bool masks = false;  // takes mask tensors, and computes entropy and max_probability
  // Each consumer has its own queries, and goes on to its next ones when it is done, not when all are: consumers stay
  // half a step apart, so that one's first and last products of a tile meet the other's softmax.
  bool own_queries = false;
  // 16-bit numbers, each of which adds to the ones before, that make up one element of q, k and v. Two for float32: the
  // second is what the first rounds away. They lie side by side in a row of the tensors that are copied.
  int terms = 1;
  // Blocks that every row of a consumer sees whole follow no running maximum: the one so far stays the exponentials'
  // reference (FlashDecoding++, arXiv 2311.01282, has one such for all rows). Where that goes wrong, the tile is done
  // again. With bfloat16 only: it has float32's range.
  bool keeps_reference = false;
  // Visits listed blocks of keys of listed heads (ForwardLists) in place of all that the rows see.
  bool listed = false;
  // The output goes through shared memory, and from there by the copy engine: whole lines, and few instructions.
  bool stages_output = false;
  // Half of the exponentials come before the wait for the product with V, not all after it. With kept references only.
  bool half_early = false;
};

// One block of threads works on kQueries rows: a producer warpgroup that copies, and the consumers.
template <ForwardTile kTile>
struct ForwardConfig {
  static constexpr int kDim = kTile.dim;
  static constexpr int kConsumers = kTile.consumers;
  static constexpr int kKeys = kTile.keys;
  static constexpr int kStages = kTile.stages;
  static constexpr int kBlocks = kTile.blocks;
  static constexpr bool kPacks = kTile.packs, kParts = kTile.parts, kMasks = kTile.masks;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr bool kOwnQueries = kTile.own_queries;
  static_assert(!kOwnQueries || !kPacks || kConsumers == 1, "the rows of a pack come in one piece");
  static constexpr int kQueryParts = kOwnQueries ? kConsumers : 1;  // that are loaded, and given back, separately
  static constexpr int kChunks = kDim / 64;  // a swizzled row of shared memory is 64 elements, 128 bytes
  static constexpr int kTerms = kTile.terms, kStoredChunks = kChunks * kTerms;  // those of the first term come first
  static_assert(kTerms == 1 || (kTerms == 2 && !kPacks && !kParts && !kMasks), "not written for two terms");
  static constexpr bool kKeepsReference = kTile.keeps_reference, kHalfEarly = kTile.half_early;
  static constexpr bool kListed = kTile.listed;
  static_assert(!kListed || (kOwnQueries && !kPacks && !kParts && !kMasks && kTerms == 1), "not written for these");
  static constexpr bool kStagesOutput = kTile.stages_output;
  static_assert(!kStagesOutput || (kOwnQueries && !kPacks && !kParts && !kMasks && kTerms == 1),
                "not written for these");
  static_assert(!kKeepsReference || (kOwnQueries && !kParts && !kMasks && kTerms == 1), "not written for these");
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // All of a multiprocessor's 65,536 registers, most of them for the accumulators. A launch gives every thread the same
  // number, a multiple of 8; one consumer alone with a producer has enough of them then.
  static constexpr int kLaunchRegisters = 65536 / kBlocks / kThreads / 8 * 8;
  static constexpr bool kTradesRegisters = kLaunchRegisters < 240;
  static constexpr int kProducerRegisters = kPacks || kBlocks == 2 ? 40 : kConsumers == 3 || kBlocks == 3 ? 32 : 24;
  static constexpr int kLeftRegisters = (kLaunchRegisters * kThreads - 128 * kProducerRegisters) / (128 * kConsumers);
  static constexpr int kConsumerRegisters = kLeftRegisters > 240 ? 240 : kLeftRegisters / 8 * 8;
  // Consumers start their products in turns. With few keys a step the turns cost more than they order.
  static constexpr bool kTakeTurns = kConsumers > 1 && !kMasks && kBlocks == 1 && (kDim == 64 || kKeys > 128);
};

// Rows that a warp writes at once.
constexpr int kOutputRows = 16;

// What output is staged in: 16 rows a warp, in chunks of 64 columns, with the 128-byte swizzle.
template <typename Config>
struct OutputStage {
  alignas(1024) std::uint16_t rows[4 * Config::kConsumers][Config::kChunks][kOutputRows][64];
};
struct NoOutputStage {};

template <typename Config>
struct ForwardShared {
  using Element = std::uint16_t;
  alignas(1024) Element q[Config::kStoredChunks][Config::kQueries][64];
  alignas(1024) Element k[Config::kStages][Config::kStoredChunks][Config::kKeys][64];
  alignas(1024) Element v[Config::kStages][Config::kStoredChunks][Config::kKeys][64];
  [[no_unique_address]] std::conditional_t<Config::kStagesOutput, OutputStage<Config>, NoOutputStage> output;
  std::uint64_t q_full[Config::kQueryParts], q_empty[Config::kQueryParts];  // q_full also guards the plan
  std::uint64_t k_full[Config::kStages], k_empty[Config::kStages];
  std::uint64_t v_full[Config::kStages], v_empty[Config::kStages];
  // Of the tile that these queries are of. Tiles take turns at two places, so that a consumer can give its queries back
  // and read the plan to the tile's end: the place is written again after it gave the next tile's queries back.
  TilePlan plan[2][Config::kQueryParts];
  unsigned failed[2][Config::kQueryParts];  // not 0: the tile in this place has to be done again
};

// What a launch asks for: the struct without the padding at its end, which can keep a second block of threads out.
template <typename Config>
constexpr int shared_bytes() {
  return static_cast<int>((offsetof(ForwardShared<Config>, failed) + sizeof(ForwardShared<Config>::failed) + 127) /
                          128 * 128);
}

// A mask tensor, broadcast by strides of 0.
struct MaskView {
  enum Kind : int { kNone, kBool, kFloat, kElement };  // kElement: of q's type

  const void* data;        // [batch, heads, query_count, key_count]
  std::int64_t stride[4];  // in elements
  Kind kind;
};

// What the softmax of a row, or of a part of its keys, leaves besides the output.
struct alignas(16) RowResult {
  float lse_log2;  // logarithm of the sum to base 2; -inf where no key is seen
  float entropy;   // nats
  float max_probability;
  float unused;
};

// Which blocks of keys tiles visit, of kListed instances, without a window, sinks or key lengths: first, downwards, all
// from the first row's last one on, so that others are seen whole; then any others.
struct ForwardLists {
  const std::uint16_t* order;  // [batch * heads, tiles_per_pack, blocks]
  const std::uint16_t* count;  // [batch * heads, tiles_per_pack] blocks of each tile
  const int* heads;            // [head_count] of batch * heads: those that run; null: all
  const int* head_count;       // [1], looked at if heads is not null
  int blocks;                  // of kKeys keys
};

struct ForwardParams {
  CUtensorMap q, k, v;    // [batch, head, token, dim], boxes of 64 columns; q of packed tiles has heads in two axes
  CUtensorMap out_boxes;  // of out, boxes of kOutputRows rows; kStagesOutput only
  TileGrid grid;
  void* out;  // [batch, heads, query_count, dim_v]
  std::int64_t out_stride[3];
  float *lse, *entropy, *max_probability;  // [batch, heads, query_count] or null
  unsigned* next_item;  // counter that starts at 0: blocks take items as they get free; null: in turn
  float scale_log2;     // scale / ln 2; > 0 but for kMasks
  int dim_v;
  MaskView mask;
  RowResult* part_rows;  // [part, kQueries]
  float* part_out;       // [part, kQueries, dim_v], normalised; rows without a key are not written
  ForwardLists lists;
};

}  // namespace adaattn::cuda::sm90
