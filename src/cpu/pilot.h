// Plans heads by trying: some rows exactly, then candidates on the same rows.
#pragma once

#include "cpu/engine.h"

namespace adaattn::cpu {

// Fills the states of the wave's heads: the caller's plans, or the cheapest whose error on trial rows is accepted.
// Heads that are not dense in float32 get their exact probe rows.
void plan_heads(const Engine& engine);

}  // namespace adaattn::cpu
