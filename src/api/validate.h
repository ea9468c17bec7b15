// Everything that can be wrong with a call, found before any kernel sees it.
#pragma once

#include <cstddef>

#include "adaattn/adaattn.h"

namespace adaattn {

enum class Need { kShapesOnly, kInputs, kAll };  // workspace queries, the reference (no outputs), run calls

// Each throws StatusError(ADAATTN_INVALID_ARGUMENT) that names the argument, what it was and what is allowed.
void validate(const adaattn_forward_args& args, Need need);
void validate(const adaattn_backward_args& args, Need need);
void validate(const adaattn_merge_args& args);
void validate(const adaattn_measure_args& args, Need need);

void validate_workspace(const void* workspace, std::size_t bytes, std::size_t needed);

}  // namespace adaattn
