// What plans, and trials of them, read of their key heads: made once some head needs it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/engine.h"

namespace adaattn::cpu {

// body(i, b, key head, keys, thread) for spans of keys of all key heads of the wave, which keeps all threads busy where
// there are few.
template <class Body>
void for_key_spans(const Engine& engine, Body body) {
  constexpr std::int64_t kSpan = 16 * kClassTile;
  const adaattn_forward_args& args = *engine.args;
  const std::int64_t spans = (args.k.shape[2] + kSpan - 1) / kSpan;
  for_all(engine, engine.wave_heads / engine.group * spans, [&](std::int64_t task, int thread) {
    const std::int64_t i = task / spans, b = (engine.first + i) / args.k.shape[1], first = task % spans * kSpan;
    body(i, b, (engine.first + i) % args.k.shape[1], KeySpan{first, std::min(first + kSpan, key_count(args, b))},
         thread);
  });
}

// Fills what the wave's heads now read of their key heads (HeadState.reads) and is not there.
void fill_key_heads(const Engine& engine);

}  // namespace adaattn::cpu
