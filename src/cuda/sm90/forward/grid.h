// How one instance of the forward kernel cuts a call up.
#pragma once

#include <algorithm>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "cuda/common/call.h"
#include "cuda/sm90/forward/split.h"

namespace adaattn::cuda::sm90 {

// Up to so many keys a head, memory and not arithmetic bounds calls of many heads: queries and outputs are as large as
// keys and values.
constexpr std::int64_t kShortKeys = 512;

// As many heads side by side as leave their keys and values about half of the L2 cache (50 to 60 MB), where they are
// short a twelfth: the rest streams through it as fast.
inline int packs_in_cache(const adaattn_forward_args& args, int packs_per_key_head) {
  const std::int64_t bytes = (args.k.shape[2] <= kShortKeys ? 4 : 24) << 20;
  const std::int64_t head = std::max<std::int64_t>(1, args.k.shape[2] * (args.k.shape[3] + args.v.shape[3]) * 2);
  const std::int64_t key_heads = std::clamp<std::int64_t>(bytes / head, 1, args.k.shape[0] * args.k.shape[1]);
  return static_cast<int>(key_heads * packs_per_key_head);
}

// q has heads, and shapes are small enough for declines_any of forward.cc.
template <typename Config>
TileGrid make_grid(const adaattn_forward_args& args, int multiprocessors) {
  TileGrid grid{};
  grid.batch = static_cast<int>(args.q.shape[0]);
  grid.heads = static_cast<int>(args.q.shape[1]);
  grid.group = static_cast<int>(args.q.shape[1] / args.k.shape[1]);
  grid.query_count = static_cast<int>(args.q.shape[2]);
  grid.key_count = static_cast<int>(args.k.shape[2]);
  grid.visibility = make_visibility(args.options, args.q.shape[2], args.k.shape[2]);
  grid.bottom_right = args.options.alignment == ADAATTN_BOTTOM_RIGHT;
  grid.key_lengths = args.key_lengths;
  choose_packs<Config>(grid);
  // One where all tiles take the same time and order does not matter.
  grid.packs_at_once = tiles_differ(args) ? packs_in_cache(args, grid.packs_per_key_head) : 1;
  choose_split<Config>(grid, multiprocessors * Config::kBlocks, tiles_differ(args));
  return grid;
}

}  // namespace adaattn::cuda::sm90
