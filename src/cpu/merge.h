// Merges attention over disjoint key sets by their log-sum-exp (ring attention, arXiv 2310.01889).
#pragma once

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

// args as adaattn_merge documents, already validated.
void merge(const adaattn_merge_args& args);

}  // namespace adaattn::cpu
