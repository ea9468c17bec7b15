// What the stages of the adaptive engine on sm_90a hand to each other.
//
//   basis    the rank-32 stand-in for q k^T, from samples of q and k            (basis.cu)
//   measure  one pass over k and v: screened keys, means of v, probe rows run exactly  (measure.cu)
//   screen   the best screened score of each block of keys for each 64 rows     (screen.cu)
//   order    each tile's blocks, those that matter most first                   (order.cu)
//   decide   how many of them each head's tiles keep, from the probe rows       (decide.cu)
//   attend   the exact kernel over them                                         (forward/, ForwardLists)
//   verify   probe rows tell the error; heads that missed run again, densely    (verify.cu)
//
// The screen is cpu/key_head.h's: q k^T less what a row has in common is (q z) (k y)^T with y, z [dim, kScreenRank],
// y^T (kc^T kc) y = n, z = (kc^T kc) y / n over n sampled keys less their mean.
#pragma once

#include <cstdint>

namespace adaattn::cuda::sm90 {

constexpr int kBlockKeys = 128;  // that are kept or left out together
constexpr int kScreenRows = 64;  // neighbouring queries with one score per block
constexpr int kScreenRank = 32;
constexpr int kProbeRows = 128;              // per query head; see probe_row
constexpr int kMostBlocks = 512;             // of a head: 65,536 keys
constexpr float kLeastScreenEnergy = 0.75f;  // cpu/key_head.h, kLeastEnergy

// A 16-bit tensor [batch, heads, tokens, dim], dim contiguous.
struct Rows16 {
  const std::uint16_t* data;
  std::int64_t stride[3];  // of batch, heads, tokens, in elements; multiples of 8, as data is of 16 bytes
};

struct AdaptiveShape {
  int batch, heads, group;  // group: query heads on one key head
  int queries, keys;
  int dim_qk, dim_v;  // multiples of 8, at most dim
  int dim;            // 64 or 128
  bool causal;        // query i sees keys up to i + diagonal
  int diagonal;
  bool bfloat16;     // else float16
  float scale_log2;  // scale / ln 2, > 0: scores are powers of two
  float error;       // budget
  int tile_rows;     // of attend's tiles, a multiple of kScreenRows
  int workers;       // thread blocks of measure, each with an equal share of all heads' blocks of keys in a row

  constexpr int key_heads() const { return batch * (heads / group); }
  constexpr int query_heads() const { return batch * heads; }
  constexpr int blocks() const { return (keys + kBlockKeys - 1) / kBlockKeys; }
  constexpr int screen_strips() const { return (queries + kScreenRows - 1) / kScreenRows; }
  constexpr int tiles() const { return (queries + tile_rows - 1) / tile_rows; }
  // Blocks of all query heads, counted through: where a worker's begin, and whose one is. What a worker has of a head
  // is a chunk, numbered head + worker.
  constexpr int share_begin(int worker) const {
    return static_cast<int>(std::int64_t{query_heads()} * blocks() * worker / workers);
  }
  constexpr int worker_of(int block) const {
    const std::int64_t all = std::int64_t{query_heads()} * blocks();
    return static_cast<int>(((block + std::int64_t{1}) * workers - 1) / all);
  }
  constexpr int chunks() const { return query_heads() + workers; }
  // Keys that a query sees.
  constexpr int seen(int query) const {
    const int end = causal ? query + diagonal + 1 : keys;
    return end < 0 ? 0 : end < keys ? end : keys;
  }
};

// Levels of blocks: 0 is always kept, level l > 0 lies between (l - 1) / 2 and l / 2 powers of two below the row's
// best, the last one anywhere below that. Keeping those up to a level is a threshold on the distance; kLevels - 1 keeps
// all.
constexpr int kLevels = 26;
constexpr float kLevelsPerPower = 2;

// A probe row lies at random in its share of the queries: one at a fixed place of each tile would not see what tiles do
// to rows elsewhere in them. Ascending with the index.
constexpr int probe_row(int index, int queries) {
  const std::int64_t begin = static_cast<std::int64_t>(index) * queries / kProbeRows;
  const std::int64_t end = static_cast<std::int64_t>(index + 1) * queries / kProbeRows;
  const unsigned random = (static_cast<unsigned>(index) * 2654435761u + 0x9E3779B9u) >> 8;
  return static_cast<int>(begin + (end > begin ? random % static_cast<unsigned>(end - begin) : 0));
}

// Of one probe row and one block of keys, or one chunk: the largest score in powers of two (-inf: no key is seen), and
// the sum of 2^(score - largest).
struct Mass {
  float top, sum;
};

// Over some probe rows, x = squared error and y = squared norm of each.
struct LevelSums {
  float x, xx, xy, y, yy, rows;
};
constexpr int kDecideParts = 16;  // thread blocks that share a head's probe rows

// What became of a head.
struct HeadState {
  int level;  // of kept blocks; kLevels - 1: all, densely
  int escalations;
  float value, limit;  // of the error: measured on the probe rows; before that, predicted from them
  int visible, kept;   // blocks, over all tiles
  float energy;        // the screen's
};

// In the caller's workspace; KH = key_heads(), QH = query_heads().
struct AdaptiveArrays {
  int* given;  // [QH] levels that the caller gives; negative: to be chosen. Null: all are
  // basis
  std::uint16_t* y;  // [KH][kScreenRank][dim], in the inputs' type; zeros from dim_qk on
  std::uint16_t* z;  // [KH][kScreenRank][dim], times scale_log2, likewise
  float* y_means;    // [KH][kScreenRank] of the sampled keys' k y, that k8 leaves out
  float* energy;     // [KH] share of the energy of sampled q kc^T that the stand-in holds; NaN: not finite
  // measure, of key heads with energy >= kLeastScreenEnergy only
  std::uint8_t* k8;    // [KH][blocks * kBlockKeys][kScreenRank] e4m3 of k y - y_means, in the order that screen.h says;
                       // keys from the tensor's end on are zeros
  float* value_means;  // [KH][blocks][dim], mean of v over the keys of the block that exist; zeros from dim_v on
  Mass* block_masses;  // [QH][kProbeRows][blocks]; causal: of keys that the row sees
  Mass* chunk_masses;  // [chunks()][kProbeRows]
  float* chunk_out;    // [chunks()][kProbeRows][dim] sum over the chunk's keys of 2^(score - chunk's top) v;
                       // not written where the sum is 0
  unsigned* not_finite;  // [KH] starts at 0; not 0: k, v or some q holds NaN or infinity
  // screen, of query heads whose key head has the energy and is finite so far
  float* distances;  // [QH][screen_strips][blocks] max over the rows of best screened score in the block less the row's
                     // best in any block, in powers of two, <= 0; -inf: no row sees a key of the block
  // order
  std::uint16_t* order;  // [QH][tiles][blocks] that the tile's rows see, by ascending level, then from the last on
  std::uint16_t* up_to_level;  // [QH][tiles][kLevels] how many of them have at most this level
  // decide
  std::uint16_t* kept;    // [QH][tiles] blocks that the tile visits
  float* exact_out;       // [QH][kProbeRows][dim], of screened heads
  LevelSums* level_sums;  // [QH][kDecideParts][kLevels]
  unsigned* counters;  // [QH + 3] start at 0: of each head's parts, of heads verified, and attend's next items, twice
  HeadState* states;   // [QH]
  // verify
  int* missed;        // [QH] heads that run again
  int* missed_count;  // [1]
};

}  // namespace adaattn::cuda::sm90
