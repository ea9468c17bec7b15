// A block of queries with every key scored: the tiles whose part of the error bound is smallest are summarised, as many
// as the allowed error takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/forward_plan.h"
#include "cpu/value_tiles.h"

namespace adaattn::cpu {

// Of one thread, beside the ForwardScratch.
struct BoundedScratch {
  float* scores;          // [block / lanes][tiles * kBoundTile][lanes]: scores, then exponentials
  float* masses;          // [block / lanes][tiles][lanes] sums of exponentials
  float* strays;          // [block / lanes][tiles][lanes] ||p - mean p|| * sigma
  double* squares;        // [tiles] of one panel: the tile's part of the squared bound if it were the only one
  std::int32_t* order;    // [tiles] of one panel, by squares
  std::uint8_t* classes;  // [block / lanes][tiles] adaattn_tile_class
  float* listed;          // [kKeyTile][lanes] masses of summarised tiles
  float* values;          // [kKeyTile][Dv rounded up] their mean v
};

// Queries of a block: as many as keep its scores near the processor's caches.
inline std::int64_t bounded_block_rows(const adaattn_forward_args& args) {
  constexpr std::int64_t kScores = std::int64_t{1} << 19;  // 2 MiB
  std::int64_t rows = static_cast<std::int64_t>(kMaxBlock);
  while (rows > static_cast<std::int64_t>(kMaxPanelLanes) && rows * args.k.shape[2] > kScores) rows /= 2;
  return rows;
}

inline BoundedScratch lay_out_bounded(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t tiles = bound_tiles(args), rows = static_cast<std::size_t>(bounded_block_rows(args));
  return {.scores = scratch.take<float>(tiles * static_cast<std::size_t>(kBoundTile) * rows),
          .masses = scratch.take<float>(tiles * rows),
          .strays = scratch.take<float>(tiles * rows),
          .squares = scratch.take<double>(tiles),
          .order = scratch.take<std::int32_t>(tiles),
          .classes = scratch.take<std::uint8_t>(tiles * rows),
          .listed = scratch.take<float>(kKeyTile * kMaxPanelLanes),
          .values = scratch.take<float>(kKeyTile * padded_width(args.v.shape[3]))};
}

// Of some rows of one head.
struct BlockBound {
  double error = 0;                        // squared upper bounds of the rows' errors, summed
  double norm = 0;                         // squared norm of what was computed
  std::int64_t tiles = 0, summarised = 0;  // tiles that some query of a panel sees, and those summarised
};

inline BlockBound add(const BlockBound& a, const BlockBound& b) {
  return {a.error + b.error, a.norm + b.norm, a.tiles + b.tiles, a.summarised + b.summarised};
}

// One block of rows of one head: plan is that of the head alone (batch and head counts 1) without a mask. allowed is
// the squared error that a panel may make per tile that it sees. classes (may be null) receives the adaattn_tile_class
// of each tile, [Nq / panel rows][tiles] of the head.
BlockBound run_bounded_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& tiles, double allowed,
                             const ForwardScratch& scratch, const BoundedScratch& bounded, std::uint8_t* classes);

// The same with no tile summarised; the summarised tiles that are counted are those that a relative error would allow.
BlockBound try_bounded_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& tiles, double relative_error,
                             const ForwardScratch& scratch, const BoundedScratch& bounded);

// The bound of rows that forward() computed: out and max_probability are read.
BlockBound bound_dense_block(const ForwardPlan& plan, std::int64_t task, const KeySizes& sizes,
                             const ForwardScratch& scratch);

}  // namespace adaattn::cpu
