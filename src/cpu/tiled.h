// Attention over the tiles of keys that matter: the screen leaves tiles out, the running rule summarises others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/forward_plan.h"
#include "cpu/screen.h"
#include "plan/tile_rule.h"

namespace adaattn::cpu {

// Of one thread, beside the ForwardScratch.
struct TiledScratch {
  float* tops;          // [tiles][lanes] best screened score of a tile, of one panel
  float* masses;        // [block / lanes][tiles][lanes] of the summarised tiles, in the order they came
  std::int32_t* lists;  // [block / lanes][tiles] which tiles those are
  std::uint8_t* kept;   // [block / lanes][tiles] 1: passed the screen
  float* values;        // [kKeyTile][Dv rounded up] means of v of summarised tiles
  float* screened_q;    // [kScreenRank][lanes]
};

inline std::size_t tile_count(const adaattn_forward_args& args) {
  return static_cast<std::size_t>((args.k.shape[2] + kScreenTile - 1) / kScreenTile);
}

inline TiledScratch lay_out_tiled(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t tiles = tile_count(args);
  return {.tops = scratch.take<float>(tiles * kMaxPanelLanes),
          .masses = scratch.take<float>(tiles * kMaxBlock),
          .lists = scratch.take<std::int32_t>(tiles * kMaxBlock),
          .kept = scratch.take<std::uint8_t>(tiles * kMaxBlock),
          .values = scratch.take<float>(kKeyTile * padded_width(args.v.shape[3])),
          .screened_q = scratch.take<float>(kScreenRank * kMaxPanelLanes)};
}

// Queries of a panel on this machine.
std::size_t panel_rows();

// One block of rows of one head: plan is that of the head alone (batch and head counts 1) without a mask. Adds to
// counts.
void run_tiled_task(const ForwardPlan& plan, std::int64_t task, const Screen& screen, const TileRule& rule,
                    const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts);

// The screen alone, for planning: adds the tiles seen and left out to counts, writes no output.
void run_screen_task(const ForwardPlan& plan, std::int64_t task, const Screen& screen, const TileRule& rule,
                     const ForwardScratch& scratch, const TiledScratch& tiled, TileCounts& counts);

}  // namespace adaattn::cpu
