// Gradients of what a forward pass within a budget computed, its tiles' classes taken as constants.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t backward_tiled_workspace(const adaattn_backward_args& args);
void backward_tiled(const adaattn_backward_args& args);

}  // namespace adaattn::cpu
