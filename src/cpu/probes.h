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

// The same from those of the rows whose blocks are the sample: of every kSampled blocks of so many rows, counted from
// the end, the second. rows: how many those are.
constexpr std::int64_t kSampled = 4;
constexpr bool is_sampled(std::int64_t block_from_end) { return block_from_end % kSampled == 1; }
struct SampledError {
  ErrorEstimate error;
  double rows;
};
SampledError sampled_error(const Engine& engine, std::int64_t index, std::int64_t block);

}  // namespace adaattn::cpu
