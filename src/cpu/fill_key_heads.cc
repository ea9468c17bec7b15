#include "cpu/fill_key_heads.h"

#include <algorithm>

namespace adaattn::cpu {
namespace {

struct Missing {
  Copies copies{};
  bool tiles = false;
};

Missing missing_of(const Engine& engine, std::int64_t i) {
  const KeyHead& keys = engine.keys[i];
  Missing found;
  for (std::int64_t h = i * engine.group; h < (i + 1) * engine.group; ++h) {
    const HeadState& state = engine.states[h];
    found.copies.int8 = found.copies.int8 || (state.reads.int8 && !keys.made.int8);
    found.copies.bfloat16 = found.copies.bfloat16 || (state.reads.bfloat16 && !keys.made.bfloat16);
    found.tiles = found.tiles || (state.reads_tiles && !keys.tiled);
  }
  found.tiles = found.tiles || found.copies.int8 || found.copies.bfloat16;
  return found;
}

}  // namespace

// Many keys are cut into spans, so that few heads keep all threads busy.
void fill_key_heads(const Engine& engine) {
  constexpr std::int64_t kSpan = 16 * kClassTile;
  const adaattn_forward_args& args = *engine.args;
  const std::int64_t key_heads = engine.wave_heads / engine.group, spans = (args.k.shape[2] + kSpan - 1) / kSpan;
  bool any = false;
  for (std::int64_t i = 0; i < key_heads; ++i) any = any || missing_of(engine, i).tiles;
  if (!any) return;
  for_all(engine, key_heads * spans, [&](std::int64_t task, int thread) {
    const std::int64_t i = task / spans, key_head = engine.first + i, b = key_head / args.k.shape[1];
    const KeyHead& keys = engine.keys[i];
    const Missing fill = missing_of(engine, i);
    const std::int64_t first = task % spans * kSpan;
    const KeySpan span = {std::max(first, keys.begun), std::min(first + kSpan, key_count(args, b))};
    if (!fill.tiles ||
        fill_tiles(args, b, key_head % args.k.shape[1], span, fill.copies, engine.scratch[thread].key_head, keys))
      return;
#pragma omp atomic write
    *keys.finite = false;
  });
  for (std::int64_t i = 0; i < key_heads; ++i) {
    const Missing filled = missing_of(engine, i);
    KeyHead& keys = engine.keys[i];
    keys.made = {.int8 = keys.made.int8 || filled.copies.int8,
                 .bfloat16 = keys.made.bfloat16 || filled.copies.bfloat16};
    keys.tiled = keys.tiled || filled.tiles;
  }
}

}  // namespace adaattn::cpu
