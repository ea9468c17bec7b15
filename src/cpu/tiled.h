// Attention of one head over tiles of keys in classes: what matters is computed in high precision, the rest in low, as
// summaries, pooled, or not at all.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/forward_plan.h"
#include "cpu/key_head.h"
#include "plan/head_plan.h"

namespace adaattn::cpu {

// Of one thread, beside the ForwardScratch.
struct TiledScratch {
  float* tops;                // [tiles][lanes] best screened score of a tile, of one panel
  float* masses;              // [block / lanes][tiles][lanes] of the tiles whose mean v counts, in the order they came
  std::int32_t* lists;        // [block / lanes][tiles] which tiles those are
  std::uint8_t* classes;      // [block / lanes][tiles] adaattn_tile_class
  float* values;              // [kKeyTile][Dv rounded up] means of v of listed tiles
  float* keys;                // [kClassTile][D] means of keys of pooled tiles
  float* screened_q;          // [kScreenRank][lanes]
  float* spread_q;            // [D][lanes]
  std::int32_t* screened_q8;  // [kScreenRank / 4][lanes]
  std::int32_t* q8;           // [block / lanes][D in fours][lanes]
  std::int32_t* q16;          // [block / lanes][D in twos][lanes]
  std::int32_t* probabilities;                  // [kClassTile / 2][lanes] packed
  float *emulated_k, *emulated_v, *emulated_q;  // [kClassTile][D], [kClassTile][Dv], [D][lanes], see cpu/emulated.h
  float* strays;  // [Dv][lanes] for each panel of a block, see cpu/tile_account-inl.h; only if masses are asked for
  float* pooled_mass;  // [block / lanes][lanes] likewise
  float* rows;         // [block / lanes][kQueryValues][lanes] values per query
};

constexpr std::size_t kQueryValues = 3;  // q8's scale and bias, and the offset of the keys' copies

inline std::size_t tile_count(const adaattn_forward_args& args) {
  return whole(static_cast<std::size_t>(args.k.shape[2]), kClassTile) / kClassTile;
}

inline bool asks_for_masses(const adaattn_forward_args& args) {
  return args.summarised_mass != nullptr || args.omitted_mass != nullptr;
}

inline TiledScratch lay_out_tiled(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t tiles = tile_count(args), d = static_cast<std::size_t>(args.q.shape[3]);
  return {
      .tops = scratch.take<float>(tiles * kMaxPanelLanes),
      .masses = scratch.take<float>(tiles * kMaxBlock),
      .lists = scratch.take<std::int32_t>(tiles * kMaxBlock),
      .classes = scratch.take<std::uint8_t>(tiles * kMaxBlock),
      .values = scratch.take<float>(kKeyTile * padded_width(args.v.shape[3])),
      .keys = scratch.take<float>(kClassTile * d),
      .screened_q = scratch.take<float>(kScreenRank * kMaxPanelLanes),
      .spread_q = scratch.take<float>(kMaxPanelLanes * d),
      .screened_q8 = scratch.take<std::int32_t>(kScreenRank / 4 * kMaxPanelLanes),
      .q8 = scratch.take<std::int32_t>(whole(d, 4) / 4 * kMaxBlock),
      .q16 = scratch.take<std::int32_t>(whole(d, 2) / 2 * kMaxBlock),
      .probabilities = scratch.take<std::int32_t>(kClassTile / 2 * kMaxPanelLanes),
      .emulated_k = scratch.take<float>(kClassTile * d),
      .emulated_v = scratch.take<float>(kClassTile * static_cast<std::size_t>(args.v.shape[3])),
      .emulated_q = scratch.take<float>(kMaxPanelLanes * d),
      .strays = scratch.take<float>(asks_for_masses(args) ? kMaxBlock * static_cast<std::size_t>(args.v.shape[3]) : 0),
      .pooled_mass = scratch.take<float>(asks_for_masses(args) ? kMaxBlock : 0),
      .rows = scratch.take<float>(kQueryValues * kMaxBlock)};
}

// Queries of a panel on this machine.
std::size_t panel_rows();

// Entries of tile_classes for one head.
inline std::int64_t tile_class_count(const adaattn_forward_args& args) {
  const auto lanes = static_cast<std::int64_t>(panel_rows());
  return (args.q.shape[2] + lanes - 1) / lanes * static_cast<std::int64_t>(tile_count(args));
}

// One block of rows of one head: plan is that of the head alone (batch and head counts 1) without a mask. Adds to
// counts. args.tile_classes, if not NULL, is the head's, as are masses; if they are asked for, account receives the
// block's.
void run_tiled_task(const ForwardPlan& plan, std::int64_t task, const KeyHead& keys, const adaattn_head_plan& rule,
                    const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts,
                    Account* account = nullptr);

// The screen alone, for planning: adds the tiles seen, left out and kept, as low or high, to counts, writes no output.
void run_screen_task(const ForwardPlan& plan, std::int64_t task, const KeyHead& keys, const adaattn_head_plan& rule,
                     const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts);

}  // namespace adaattn::cpu
