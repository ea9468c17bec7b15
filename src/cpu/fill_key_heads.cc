#include "cpu/fill_key_heads.h"

#include <algorithm>
#include <cstdint>

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

void fill_key_heads(const Engine& engine) {
  const std::int64_t key_heads = engine.wave_heads / engine.group;
  bool any = false;
  for (std::int64_t i = 0; i < key_heads; ++i) any = any || missing_of(engine, i).tiles;
  if (!any) return;
  for_key_spans(engine, [&](std::int64_t i, std::int64_t b, std::int64_t key_head, KeySpan span, int thread) {
    const KeyHead& keys = engine.keys[i];
    const Missing fill = missing_of(engine, i);
    span.first = std::max(span.first, keys.begun);
    if (!fill.tiles || fill_tiles(*engine.args, b, key_head, span, fill.copies, engine.scratch[thread].key_head, keys))
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
