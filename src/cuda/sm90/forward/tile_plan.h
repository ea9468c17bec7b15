// How a call is cut into tiles of query rows, and those, where there are few, into parts of their keys. Plain
// arithmetic, the same on the host and on the device; Config stands for kQueries, kKeys, kPacks and kParts of config.h.
#pragma once

#include <cstdint>

#include "common/visibility.h"

namespace adaattn::cuda::sm90 {

// The rows of a tile are pack_tokens queries of pack_heads heads each, heads fastest. The heads of a pack share a key
// head, so that few queries of many heads still fill a tile. One head a pack: rows are queries.
struct TileGrid {
  int batch, heads, group;  // group: query heads on one key head
  int query_count, key_count;
  Visibility visibility;            // of batch entries without a key length; the diagonal of others moves with theirs
  const std::int64_t* key_lengths;  // [batch] or null
  bool bottom_right;
  int pack_heads, pack_tokens;
  int packs_per_key_head, tiles_per_pack;
  int packs_at_once;  // so many packs are worked on side by side, their longest tiles first
  // Tiles from whole_tiles on are worked on in so many parts, each of which takes a share of the keys.
  int whole_tiles, parts;
};

// What the producer tells the consumers about a tile of queries: which key blocks it meets.
struct TilePlan {
  // kSteady: references are kept (see ForwardTile). kCareful: the running maximum is followed everywhere. kIdle:
  // nothing to do, so that the producer learns whether the tiles before went well. kEnd: no more work.
  enum Kind : int { kSteady, kCareful, kIdle, kEnd };

  Kind kind;
  int first_query, head, batch;  // head counts within the batch
  int key_head, pack_heads;      // pack_heads: those of the pack that exist
  int part;                      // where the partial result goes, or kWhole
  int key_count;                 // keys of this batch entry
  int steps;                     // key blocks to visit
  int window_steps;              // the first so many go down from block_end - 1, the others down from sink_blocks - 1
  int block_end, sink_blocks;

  static constexpr int kWhole = -1;
};

// By value: std::min takes addresses, and the compiler keeps what they are of in memory.
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int clamp_int(int value, int low, int high) { return most(low, least(value, high)); }
constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

constexpr int pack_count(const TileGrid& grid) {
  return grid.batch * (grid.heads / grid.group) * grid.packs_per_key_head;
}
constexpr int tile_count(const TileGrid& grid) { return pack_count(grid) * grid.tiles_per_pack; }
// What blocks of threads take one by one: whole tiles first, then parts, those of one tile side by side.
constexpr int item_count(const TileGrid& grid) {
  return grid.whole_tiles + (tile_count(grid) - grid.whole_tiles) * grid.parts;
}

constexpr Visibility visibility_of(const TileGrid& grid, int key_count) {
  Visibility visibility = grid.visibility;
  visibility.key_count = key_count;
  if (grid.bottom_right) visibility.diagonal = key_count - grid.query_count;
  return visibility;
}

// Where the keys that a query sees end; nothing limits them to the left. What 64 bits would take is in each tile's
// chain.
constexpr int seen_end(const TileGrid& grid, int key_count, int query) {
  if (grid.visibility.right >= 1 << 30) return key_count;  // fewer tokens than that
  const int diagonal = grid.bottom_right ? key_count - grid.query_count : static_cast<int>(grid.visibility.diagonal);
  return clamp_int(query + diagonal + static_cast<int>(grid.visibility.right) + 1, 0, key_count);
}
constexpr bool limited_left(const TileGrid& grid) { return grid.visibility.left < kUnlimited; }

// Which query of which head a row of a tile is.
struct RowPlace {
  int head, query;
  bool exists;
};

template <typename Config>
constexpr int query_of_row(const TileGrid& grid, int first_query, int row) {
  return first_query + (Config::kPacks ? row / grid.pack_heads : row);
}

template <typename Config>
constexpr RowPlace place_of_row(const TileGrid& grid, const TilePlan& plan, int row) {
  const int query = query_of_row<Config>(grid, plan.first_query, row);
  if (!Config::kPacks) return {.head = plan.head, .query = query, .exists = query < grid.query_count};
  const int head = row % grid.pack_heads;
  const bool in_box = row < grid.pack_heads * grid.pack_tokens;
  return {
      .head = plan.head + head, .query = query, .exists = in_box && head < plan.pack_heads && query < grid.query_count};
}

// Leaves the plan of a tile the share of its steps that one part takes; the shares of all parts make up the tile.
constexpr void take_part(TilePlan& plan, int part, int parts) {
  const int begin = static_cast<int>(static_cast<std::int64_t>(plan.steps) * part / parts);
  const int end = static_cast<int>(static_cast<std::int64_t>(plan.steps) * (part + 1) / parts);
  const int window_steps = clamp_int(plan.window_steps - begin, 0, end - begin);
  plan.sink_blocks -= most(0, begin - plan.window_steps);
  plan.block_end -= begin;
  plan.window_steps = window_steps;
  plan.steps = end - begin;
}

// Where item lies, without the keys that it meets. Last tiles of a head first: under a causal mask they are the
// longest. Heads side by side share the L2 cache, so their number is bounded by what their keys and values take there.
template <typename Config>
constexpr TilePlan place_of_item(const TileGrid& grid, int item) {
  int tile = item;
  TilePlan plan{};
  plan.part = TilePlan::kWhole;
  if (Config::kParts && item >= grid.whole_tiles) {
    plan.part = item - grid.whole_tiles;
    tile = grid.whole_tiles + plan.part / grid.parts;
  }
  const int packs = pack_count(grid), tiles = grid.tiles_per_pack;
  const int first_pack = tile / (grid.packs_at_once * tiles) * grid.packs_at_once;
  const int side_by_side = least(grid.packs_at_once, packs - first_pack);
  const int rest = tile - first_pack * tiles, pack = first_pack + rest % side_by_side;
  plan.first_query = (tiles - 1 - rest / side_by_side) * (Config::kPacks ? grid.pack_tokens : Config::kQueries);
  if (Config::kPacks) {
    const int key_head = pack / grid.packs_per_key_head;
    const int first_in_group = pack % grid.packs_per_key_head * grid.pack_heads, key_heads = grid.heads / grid.group;
    plan.batch = key_head / key_heads;
    plan.key_head = key_head % key_heads;
    plan.head = plan.key_head * grid.group + first_in_group;
    plan.pack_heads = least(grid.pack_heads, grid.group - first_in_group);
  } else {
    plan.batch = pack / grid.heads;
    plan.head = pack % grid.heads;
    plan.key_head = plan.head / grid.group;
    plan.pack_heads = 1;
  }
  return plan;
}

// Fills in which blocks of keys the tile meets.
template <typename Config>
constexpr void meet_keys(const TileGrid& grid, TilePlan& plan) {
  const Visibility visibility = visibility_of(grid, plan.key_count);
  const int tokens = Config::kPacks ? grid.pack_tokens : Config::kQueries;
  const int first = plan.first_query, last = least(first + tokens, grid.query_count) - 1;
  const KeyRange any = visible_keys(visibility, first, last);
  constexpr int kKeys = Config::kKeys;
  plan.block_end = static_cast<int>((any.end + kKeys - 1) / kKeys);
  const int block_begin = any.begin < any.end ? static_cast<int>(any.begin / kKeys) : plan.block_end;
  plan.window_steps = plan.block_end - block_begin;
  plan.sink_blocks = least(static_cast<int>((any.sink_end + kKeys - 1) / kKeys), block_begin);
  plan.steps = plan.window_steps + plan.sink_blocks;
}

template <typename Config>
constexpr TilePlan plan_item(const TileGrid& grid, int item) {
  TilePlan plan = place_of_item<Config>(grid, item);
  plan.key_count = grid.key_count;
  if (grid.key_lengths != nullptr)
    plan.key_count = static_cast<int>(clamp_index(grid.key_lengths[plan.batch], 0, grid.key_count));
  meet_keys<Config>(grid, plan);
  if (Config::kParts && plan.part != TilePlan::kWhole) take_part(plan, plan.part % grid.parts, grid.parts);
  return plan;
}

// The same where only the first head_count of heads, of all batch entries, run. Which blocks are visited is for the
// list to say: of the plan's steps count are left, as if they were the first.
template <typename Config>
constexpr TilePlan place_of_listed(const TileGrid& grid, int head_count, const int* heads, int item) {
  TileGrid flat = grid;
  flat.batch = 1, flat.heads = head_count, flat.group = flat.packs_per_key_head = 1;
  TilePlan plan = place_of_item<Config>(flat, item);
  const int head = heads != nullptr ? heads[plan.head] : plan.head;
  plan.batch = head / grid.heads;
  plan.head = head % grid.heads;
  plan.key_head = plan.head / grid.group;
  plan.key_count = grid.key_count;
  meet_keys<Config>(grid, plan);
  return plan;
}
constexpr void keep_steps(TilePlan& plan, int count) {
  plan.steps = plan.window_steps = least(count, plan.window_steps);
  plan.sink_blocks = 0;
}

constexpr int block_of_step(const TilePlan& plan, int step) {
  return step < plan.window_steps ? plan.block_end - 1 - step : plan.sink_blocks - 1 - (step - plan.window_steps);
}

// What one consumer's 64 rows do in their tile.
struct StripPlan {
  int first_step;            // steps before it hold no key that these rows see
  int full_begin, full_end;  // blocks in [full_begin, full_end) are seen whole by every row
  int steady_end;            // of those before it each row has seen a key of a block visited earlier
};

template <typename Config>
constexpr StripPlan plan_strip(const TileGrid& grid, const TilePlan& plan, int consumer) {
  constexpr int kKeys = Config::kKeys;
  const int first = query_of_row<Config>(grid, plan.first_query, 64 * consumer);
  int last = least(query_of_row<Config>(grid, plan.first_query, 64 * consumer + 63), grid.query_count - 1);
  if (Config::kPacks) last = least(last, plan.first_query + grid.pack_tokens - 1);
  if (first > last) return {.first_step = plan.steps, .full_begin = 0, .full_end = 0, .steady_end = 0};
  if (!limited_left(grid)) {
    const int end = seen_end(grid, plan.key_count, first), last_end = seen_end(grid, plan.key_count, last);
    return {.first_step = clamp_int(plan.block_end - divide_up(last_end, kKeys), 0, plan.window_steps),
            .full_begin = 0,
            .full_end = end / kKeys,
            .steady_end = (end - 1) / kKeys};
  }
  const Visibility visibility = visibility_of(grid, plan.key_count);
  const KeyRange of_first = visible_keys(visibility, first, first), of_last = visible_keys(visibility, last, last);
  const int block_end = static_cast<int>((of_last.end + kKeys - 1) / kKeys);
  return {.first_step = clamp_int(plan.block_end - block_end, 0, plan.window_steps),
          .full_begin = static_cast<int>((of_last.begin + kKeys - 1) / kKeys),
          .full_end = static_cast<int>(of_first.end / kKeys),
          .steady_end = static_cast<int>((of_first.end - 1) / kKeys)};
}

// Entries [sink_end, begin) and [end, ...) of a run of keys are hidden; all relative to its first key.
struct HiddenKeys {
  int sink_end, begin, end;
};

constexpr HiddenKeys hidden_keys(const Visibility& visibility, int query, int first_key) {
  const KeyRange seen = visible_keys(visibility, query, query);
  return {.sink_end = static_cast<int>(seen.sink_end) - first_key,
          .begin = static_cast<int>(seen.begin) - first_key,
          .end = static_cast<int>(seen.end) - first_key};
}

}  // namespace adaattn::cuda::sm90
