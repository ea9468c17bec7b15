// Tile sizes of the sm_80 backward kernel, its shared-memory plan, and its parameters.
#pragma once

#include <cstdint>

#include "common/visibility.h"
#include "cuda/sm80/mask_view.h"
#include "cuda/sm80/matrix_view.h"
#include "cuda/sm80/reach.h"

namespace adaattn::cuda::sm80 {

// One block of threads works on kKeys keys, and visits the queries kQueries at a time. Its eight warps share S^T and
// dP^T as four times two tiles, dK and dV as tiles of 32 keys, and dQ as tiles of 32 queries by 32 columns.
template <int kDim_, int kQueries_, int kKeys_>
struct BackwardConfig {
  static constexpr int kDim = kDim_;  // head size, padded with zeros to 64, 128 or 256
  static constexpr int kQueries = kQueries_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kScoreStrips = kKeys / 64;                 // a warp's rows of S^T and dP^T, in strips of 16
  static constexpr int kQueryColumns = kQueries / 2;              // and its columns
  static constexpr int kKeyGroups = kKeys / 32;                   // tiles of dK and dV along the keys
  static constexpr int kDimColumns = kDim * kKeyGroups / kWarps;  // and their columns
  static constexpr int kDqRowTiles = kQueries / 32;               // tiles of dQ along the queries
  static constexpr int kRow = kQueries < 64 ? 64 : kQueries;      // elements from row to row of p and ds (tiles.cuh)
  static_assert(kDqRowTiles * (kDim / 32) == kWarps, "each warp has one tile of dQ");
};

// What one block of threads does: all queries of one key head's group that see its keys.
struct KeyPlan {
  int first_key, key_head, batch;
  int first_tile, tiles;     // of queries, per query head
  int full_begin, full_end;  // queries in [full_begin, full_end) see all keys of the block
  Reach reach;
};

// A place in the walk over the query tiles of a plan, one after the other, head by head.
struct QueryPlace {
  int head, tile;
};

template <typename Config>
struct BackwardShared {
  using Element = std::uint16_t;
  struct Stage {  // one tile of queries
    QueryPlace place;
    alignas(128) Element q[Config::kQueries][Config::kDim];
    alignas(128) Element dout[Config::kQueries][Config::kDim];
    alignas(16) float rows[2][Config::kQueries];  // lse / ln 2, delta
  };
  alignas(128) Element k[Config::kKeys][Config::kDim];
  alignas(128) Element v[Config::kKeys][Config::kDim];
  Stage stages[2];
  alignas(128) Element p[Config::kKeys][Config::kRow];
  alignas(128) Element ds[Config::kKeys][Config::kRow];
  KeyPlan plan;
};

struct BackwardParams {
  MatrixView q, k, v, dout, dk, dv;
  const float* rows;                // [batch, heads, query_tiles, 2, kQueries]: lse / ln 2 and delta of each query
  float* dq;                        // [batch, heads, query_tiles, warp, register, lane]: sums
  const std::int64_t* key_lengths;  // [batch] or null
  unsigned* order;                  // null, or what makes the sums for dQ deterministic: a ticket counter, then
                                    // how many blocks have added, [batch, heads, query_tiles]
  MaskView mask;
  float scale, scale_log2;  // scale / ln 2
  int batch, heads, group;  // group: query heads on one key head
  int query_count, key_count, dim, dim_v;
  Visibility visibility;  // of batch entries without a key length; the diagonal of others moves with their length
  bool bottom_right;
  int key_tiles, query_tiles;  // per head
  int heads_at_once;           // so many key heads are worked on side by side, their longest blocks first
};

// What happens once per query row.
struct RowParams {
  MatrixView out, dout, dq;
  const float* lse;  // [batch, heads, query_count]
  float* rows;       // as BackwardParams has it; written by prepare
  const float* dq_sums;
  float scale;
  int batch, heads, query_count, query_tiles, dim, dim_v;
};

}  // namespace adaattn::cuda::sm80
