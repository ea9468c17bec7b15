// Exact gradients on the CPU from a given output and log-sum-exp.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t backward_workspace(const adaattn_backward_args& args);
void backward(const adaattn_backward_args& args);

}  // namespace adaattn::cpu
