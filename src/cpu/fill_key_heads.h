// What plans, and trials of them, read of their key heads: made once some head needs it.
#pragma once

#include "cpu/engine.h"

namespace adaattn::cpu {

// Fills what the wave's heads now read of their key heads (HeadState.reads) and is not there.
void fill_key_heads(const Engine& engine);

}  // namespace adaattn::cpu
