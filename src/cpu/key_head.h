// What the adaptive kernel knows of one (batch, key head) before it attends: the screen, tiles' means, low precision.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/quantized.h"

namespace adaattn::cpu {

// The screen: rank-r stand-ins for q and k whose scores say, at r / D of the cost, which tiles of keys can matter.
//
// Q Kc^T (keys less their mean, which no softmax sees) is replaced by (Q Z) (Kc Y)^T with Y, Z [D][r]. For a given Y
// with Y^T (Kc^T Kc) Y = I, Z = (Kc^T Kc) Y is the best choice (least squares), and the best Y spans the top
// eigenvectors of (Q^T Q)(Kc^T Kc); a randomized subspace iteration finds it (Halko, Martinsson and Tropp, arXiv
// 0909.4061, algorithm 4.4), without any decomposition larger than r x r.
// (Keys of a tile, r and the sample: docs/decisions/0005-cpu-tiles.md.)
constexpr std::size_t kScreenRank = 32;                             // r, at most
constexpr std::size_t kSmallRank = 16;                              // r of heads whose spectrum falls fast:
constexpr float kEnoughEnergy = 0.95F;                              // those of which it holds this share
constexpr std::size_t kRankColumns = 32;                            // the same in whole panels
constexpr std::int64_t kLeastGramRows = 256, kMostGramRows = 1024;  // evenly spaced, an eighth: the basis' sample
// A screen that holds less of the scores' energy is of no use to a head that is planned. Below it single rows lose
// their best tile, which probe rows seldom see: heads made so (bench/budget/cases.py) were up to 45 times over at 0.5.
// Heads of language models lie above.
constexpr float kLeastEnergy = 0.75F;
// Values of 64 keys of a language model differ from their mean by up to 3.3 times the rms; the most there can be is 8.
// A row that finds a value beyond them errs by as much if its tile is left out, and few rows may.
constexpr float kStandsOut = 4;
constexpr std::size_t kPool = 16;  // keys of a pooled one
constexpr std::size_t kPoolsOfTile = static_cast<std::size_t>(kClassTile) / kPool;

// What is wanted of a KeyHead.
struct Parts {
  bool screen, int8_screen;
  Copies copies;
};

// Arrays in the caller's workspace.
struct KeyHead {
  bool screened;         // whether the screen's arrays, and the pooled ones, are filled
  float* z;              // [D][kScreenRank], for q
  float* y;              // [D rounded up to panels][kRankColumns], for k
  float* spread;         // [D][D rounded up to panels] Kc^T Kc, and
  float* sampled;        // [1] of how many keys: q's scores have the variance (q^T Kc^T Kc q) / sampled, and what the
                         // screen does not see of it is (q^T Kc^T Kc q - ||Z^T q||^2) / sampled
  std::int64_t* rank;    // [1] kScreenRank or kSmallRank: dimensions of the screen that are used
  float* k;              // [Nk in whole tiles][rank], Kc Y; NULL if there is k8
  std::uint8_t* k8;      // the same as bytes, 128 more than the value, or NULL
  float* k8_scale;       // [tiles]
  float* mean;           // [D rounded up to panels], of (sampled) keys
  float* value_means;    // [tiles][Dv rounded up to panels], mean of v over each tile
  bool* stands_out;      // [tiles] whether one value differs from its tile's mean by more than kStandsOut times the rms
  float* pooled_keys;    // [tiles][kPoolsOfTile][D], means of kPool neighbouring keys
  float* pooled_values;  // [tiles][kPoolsOfTile][Dv rounded up to panels], of their values
  float* energy;         // [1] share of ||Q Kc^T||_F^2 that the rank-r product holds, over the sampled rows
  bool* finite;          // [1] whether what was filled holds only finite values
  Copies copies;         // that are laid out, and
  std::int64_t begun;  // keys from the first on whose tiles were filled, with all copies, before it was known which pay
  Copies made;         // that are filled for all keys
  bool tiled;          // whether value_means are, too
  Quantized copy;
};

// Of one thread, while it builds a KeyHead.
struct KeyHeadScratch {
  float* rows;             // [kKeyTile][width], converted or centred rows
  float* values;           // [kKeyTile][width]
  float *gram_q, *gram_k;  // [width][width]
  float *y, *t;            // [kScreenRank][width]
  float* columns;          // [width][kRankColumns]
  float* projected;        // [kKeyTile][kRankColumns]
  float* tops;             // [tiles][kMaxPanelLanes]
};

inline KeyHead lay_out_key_head(const adaattn_forward_args& args, Parts parts, Scratch& scratch) {
  const auto d = static_cast<std::size_t>(args.q.shape[3]), width_v = padded_width(args.v.shape[3]);
  const std::size_t keys = whole(static_cast<std::size_t>(args.k.shape[2]), kClassTile), tiles = keys / kClassTile;
  KeyHead head{};
  head.copies = parts.copies;
  head.mean = scratch.take<float>(padded_width(args.q.shape[3]));
  head.value_means = scratch.take<float>(tiles * width_v);
  head.energy = scratch.take<float>(1);
  head.finite = scratch.take<bool>(1);
  head.copy = lay_out_quantized(args, parts.copies, scratch);
  if (!parts.screen) return head;
  head.z = scratch.take<float>(d * kScreenRank);
  head.y = scratch.take<float>(padded_width(args.q.shape[3]) * kRankColumns);
  head.spread = scratch.take<float>(d * padded_width(args.q.shape[3]));
  head.sampled = scratch.take<float>(1);
  head.rank = scratch.take<std::int64_t>(1);
  if (parts.int8_screen)
    head.k8 = scratch.take<std::uint8_t>(keys * kScreenRank);
  else
    head.k = scratch.take<float>(keys * kScreenRank);
  head.k8_scale = scratch.take<float>(tiles);
  head.stands_out = scratch.take<bool>(tiles);
  head.pooled_keys = scratch.take<float>(tiles * kPoolsOfTile * d);
  head.pooled_values = scratch.take<float>(tiles * kPoolsOfTile * width_v);
  return head;
}

inline KeyHeadScratch lay_out_key_head_thread(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t width = padded_width(std::max(args.q.shape[3], args.v.shape[3]));
  return {.rows = scratch.take<float>(kKeyTile * width),
          .values = scratch.take<float>(kKeyTile * width),
          .gram_q = scratch.take<float>(width * width),
          .gram_k = scratch.take<float>(width * width),
          .y = scratch.take<float>(width * kScreenRank),
          .t = scratch.take<float>(width * kScreenRank),
          .columns = scratch.take<float>(width * kRankColumns),
          .projected = scratch.take<float>(kKeyTile * kRankColumns),
          .tops = scratch.take<float>(whole(static_cast<std::size_t>(args.k.shape[2]), kClassTile) / kClassTile *
                                      kMaxPanelLanes)};
}

// Begins one (batch, key head): the keys' mean, and the tiles of the first keys with all copies. There is no screen.
void begin_key_head(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, std::int64_t keys,
                    const KeyHeadScratch& scratch, KeyHead& to);

// Fills the means of values and the copies for the tiles of some keys, whole ones but for the last. Returns whether
// their k and v are finite; if not, the rest is left as it is.
struct KeySpan {
  std::int64_t first, end;
};
bool fill_tiles(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys, Copies copies,
                const KeyHeadScratch& scratch, const KeyHead& to);

// The screen, for all query heads that share it: first its basis, which must be laid out, and the energy. Directions
// beyond those that q and k have come out as 0.
void find_screen(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, const KeyHeadScratch& scratch,
                 const KeyHead& to);

// Then its tiles, whole ones but for the last. k and v must be finite and value_means filled.
void fill_screen(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys,
                 const KeyHeadScratch& scratch, const KeyHead& to);

// KeyHead.mean alone, of the first keys; rows: scratch, [kKeyTile][D rounded up to panels].
void find_key_mean(const adaattn_tensor& k, std::int64_t b, std::int64_t key_head, std::int64_t keys, float* rows,
                   float* mean);

}  // namespace adaattn::cpu
