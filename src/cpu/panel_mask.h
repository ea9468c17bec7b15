// Which keys the queries of one panel see: a hull for the tile, and bounds for each lane.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "common/visibility.h"

namespace adaattn::cpu {

// Consecutive rows of the list of group * Nq query rows that share a key head.
struct PanelRows {
  std::int64_t b, first_head;  // batch entry, first query head of the group
  std::int64_t nq;
  std::int64_t first, count;

  std::int64_t head_of(std::int64_t row) const { return first_head + row / nq; }
  std::int64_t query_of(std::int64_t row) const { return row % nq; }
  // Smallest and largest query among the rows.
  bool one_head() const { return first / nq == (first + count - 1) / nq; }
  std::int64_t first_query() const { return one_head() ? query_of(first) : 0; }
  std::int64_t last_query() const { return one_head() ? query_of(first + count - 1) : nq - 1; }
};

// The keys of [tile_begin, tile_end) that some row sees, as a hull, and whether every row sees all of them.
struct TileView {
  std::int64_t begin, end;
  bool all_visible;
};

inline TileView view_tile(const Visibility& visibility, const PanelRows& rows, std::int64_t tile_begin,
                          std::int64_t tile_end) {
  const KeyRange any = visible_keys(visibility, rows.first_query(), rows.last_query());
  const std::int64_t begin = tile_begin < any.sink_end ? tile_begin : std::max(tile_begin, any.begin);
  const std::int64_t end = tile_end > any.begin ? std::min(tile_end, any.end) : std::min(tile_end, any.sink_end);
  const std::int64_t everyone_from = visible_keys(visibility, rows.last_query(), rows.last_query()).begin;
  const std::int64_t everyone_to = visible_keys(visibility, rows.first_query(), rows.first_query()).end;
  return {.begin = begin, .end = end, .all_visible = begin >= everyone_from && end <= everyone_to};
}

// Per-lane bounds relative to a tile, in 32 bits for vector compares: lane sees key j of the tile if
// j < sink_end or begin <= j < end.
template <std::size_t kLanes>
struct LaneBounds {
  std::int32_t sink_end[kLanes], begin[kLanes], end[kLanes];

  LaneBounds(const Visibility& visibility, const PanelRows& rows, std::int64_t tile_begin) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::int64_t query = rows.query_of(rows.first + std::min(static_cast<std::int64_t>(lane), rows.count - 1));
      const KeyRange range = visible_keys(visibility, query, query);
      sink_end[lane] = static_cast<std::int32_t>(clamp_index(range.sink_end - tile_begin, -kMost, kMost));
      begin[lane] = static_cast<std::int32_t>(clamp_index(range.begin - tile_begin, -kMost, kMost));
      end[lane] = static_cast<std::int32_t>(clamp_index(range.end - tile_begin, -kMost, kMost));
    }
  }
};

}  // namespace adaattn::cpu
