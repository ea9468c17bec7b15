// Attention of one head in FP64, on vector units: for heads whose bound float32 rounding alone exceeds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"

namespace adaattn::cpu {

constexpr std::int64_t kDoubleRows = 8;  // query rows of a task, which share the conversion of keys and values

// Of one thread.
struct DoubleScratch {
  double* scores;  // [kDoubleRows][Nk]: scores, then exponentials
  double* q;       // [kDoubleRows][D], times the scale
  float* tile;     // [kKeyTile][max(D, Dv)] where k or v cannot be read in place
};

DoubleScratch lay_out_double_rows(const adaattn_forward_args& args, Scratch& scratch);

// Rows [first, first + kDoubleRows) as far as there are any, of a head alone (batch and head counts 1) without mask and
// window. out [Nq][Dv] and lse [Nq] receive FP64; head.entropy and head.max_probability theirs if not NULL.
void run_double_rows(const adaattn_forward_args& head, std::int64_t first, const DoubleScratch& scratch, double* out,
                     double* lse);

}  // namespace adaattn::cpu
