// Exact attention on the CPU for few query rows (decoding with a KV cache): bound by reading K and V once.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t decode_workspace(const adaattn_forward_args& args);
void decode(const adaattn_forward_args& args);

}  // namespace adaattn::cpu
