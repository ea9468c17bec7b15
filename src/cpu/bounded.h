// Attention within a budget that an upper bound on each head's error certifies.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t bounded_workspace(const adaattn_forward_args& args);
void bounded(const adaattn_forward_args& args);

}  // namespace adaattn::cpu
