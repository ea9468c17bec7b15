// The measure stage: statistics of q, k, v and of the softmax, head by head, for plans and for people.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn::measure {

// Arguments have been validated.
std::size_t workspace_bytes(const adaattn_measure_args& args);
void run(const adaattn_measure_args& args);

}  // namespace adaattn::measure
