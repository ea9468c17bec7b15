// How many heads share a tile, and in how many parts tiles are worked on: chosen on the host from shapes alone, so that
// the same call always runs, and rounds, the same way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/forward/tile_plan.h"

namespace adaattn::cuda::sm90 {

// Parts that the kernel which combines them takes: two a lane.
constexpr int kMostParts = 64;

// What a tile costs besides its steps, in steps: the first product of scores and the last with V overlap with nothing
// (3,500 cycles where a step takes 2,800, measured), and the next tile's loads start late.
constexpr int kTileSteps = 2;
// What each part adds: its float32 rows are written, and read by another kernel (64 rows x D x 8 bytes, as many as two
// steps of 64 keys bring in).
constexpr int kPartSteps = 2;
// What the second launch adds to the call (2 to 3 us, 4,000 to 5,000 cycles).
constexpr int kCombineSteps = 2;

// Fills in a grid's packs: all heads of a group in one tile if that makes fewer tiles, else one head a tile.
template <typename Config>
constexpr void choose_packs(TileGrid& grid) {
  const auto set = [&](int pack_heads) {
    grid.pack_heads = pack_heads;
    grid.pack_tokens = Config::kQueries / pack_heads;
    grid.packs_per_key_head = divide_up(grid.group, pack_heads);
    grid.tiles_per_pack = divide_up(grid.query_count, grid.pack_tokens);
    return static_cast<std::int64_t>(grid.packs_per_key_head) * grid.tiles_per_pack;
  };
  const std::int64_t single = set(1);
  if (!Config::kPacks || grid.group == 1) return;
  if (set(std::min(grid.group, Config::kQueries)) >= single) set(1);
}

// Steps that the busiest of slots blocks of threads takes with so many tiles, at most slots, in parts.
constexpr int busiest_steps(int tiles, int steps, int parts, int slots) {
  const int each = divide_up(steps, parts) + kTileSteps + (parts > 1 ? kPartSteps : 0);
  return divide_up(tiles * parts, slots) * each;
}

// In how many parts to work on tiles of at most so many steps, slots of which run at a time: the least of the costs
// above, and of equal ones the least parts. More rounds gain nothing, and the search is part of each call.
constexpr int choose_parts(int tiles, int steps, int slots) {
  constexpr int kMostRounds = 6;
  int best = 1, fewest = busiest_steps(tiles, steps, 1, slots);
  for (int parts = 2; parts <= least(steps, kMostParts) && tiles * parts <= kMostRounds * slots; ++parts) {
    const int cost = busiest_steps(tiles, steps, parts, slots) + kCombineSteps;
    if (cost < fewest) best = parts, fewest = cost;
  }
  return best;
}

// Steps of the longest tile if no key length shortens it: an upper bound that needs no look at any key.
template <typename Config>
constexpr int most_steps(const TileGrid& grid) {
  const Visibility& v = grid.visibility;
  const std::int64_t all = grid.key_count;
  const std::int64_t queries = std::min(grid.query_count, Config::kPacks ? grid.pack_tokens : Config::kQueries);
  const std::int64_t window =
      v.left >= kUnlimited || v.right >= kUnlimited ? all : std::min(all, v.left + v.right + queries + v.sinks);
  // The window may begin and end within a block, and so may the sinks.
  const std::int64_t blocks = (window + Config::kKeys - 1) / Config::kKeys + (window < all ? 2 : 0);
  return static_cast<int>(std::min(blocks, (all + Config::kKeys - 1) / Config::kKeys));
}

// Which tiles are worked on in how many parts: all of them if there are fewer than slots, else those that would be left
// for a last round with slots to spare. In a call with tiles of different length these get done when others are still
// at work, so that nothing waits for them.
template <typename Config>
constexpr void choose_split(TileGrid& grid, int slots, bool tiles_differ) {
  const int tiles = tile_count(grid);
  grid.whole_tiles = tiles, grid.parts = 1;
  if (!Config::kParts || (tiles_differ && tiles >= slots)) return;
  const int whole = tiles / slots * slots;
  const int parts = choose_parts(tiles - whole, most_steps<Config>(grid), slots);
  if (parts > 1) grid.whole_tiles = whole, grid.parts = parts;
}

}  // namespace adaattn::cuda::sm90
