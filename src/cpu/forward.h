// Exact forward attention on the CPU: tiles of keys, queries along the vector lanes, online softmax.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t forward_workspace(const adaattn_forward_args& args);
void forward(const adaattn_forward_args& args);

}  // namespace adaattn::cpu
