// Attention within an error budget on the CPU: measure, plan, attend, verify, and attend again where it was not enough.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t adaptive_workspace(const adaattn_forward_args& args);
void adaptive(const adaattn_forward_args& args);

}  // namespace adaattn::cpu
