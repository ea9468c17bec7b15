// The error of a head's output, from evenly spaced rows that were also run exactly.
#pragma once

#include <cstdint>

#include "cpu/engine.h"

namespace adaattn::cpu {

// Runs the first set of a head's probe rows exactly.
void run_probes(const Engine& engine, std::int64_t index, int thread);

// Less what rounding to the output's dtype put there. Twice as many rows are asked where they may show that the output
// is within the budget: that costs less than running the head again.
ErrorEstimate probe_error(const Engine& engine, std::int64_t index, int thread);

}  // namespace adaattn::cpu
