// How much of a head a screen could leave out at all: asked before one is built, where little is to be gained.
#pragma once

#include <cstdint>

#include "cpu/key_head.h"

namespace adaattn::cpu {

// Share, of a third of the tiles that one panel of late queries of (b, query head) sees whole, whose exact scores all
// lie below their row's best by more than below (natural log, negative). No screen leaves out much more: it sees less
// and keeps a margin. Costs a third of a panel's scores.
double droppable_share(const adaattn_forward_args& args, std::int64_t b, std::int64_t head, float below,
                       const KeyHeadScratch& scratch);

}  // namespace adaattn::cpu
