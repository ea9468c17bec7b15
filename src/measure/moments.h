// Magnitudes, mean and Gram matrix of the rows of one head.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/scratch.h"
#include "cpu/forward_plan.h"
#include "cpu/rows.h"

namespace adaattn::measure {

struct MomentsScratch {    // of one thread
  float* rows;             // [cpu::kKeyTile][width]
  float* gram;             // [width][width]
  double *squares, *mean;  // [width]
  float* largest;          // [width]
};

inline MomentsScratch lay_out_moments(std::int64_t widest, Scratch& scratch) {
  const std::size_t width = cpu::padded_width(widest);
  return {.rows = scratch.take<float>(cpu::kKeyTile * width),
          .gram = scratch.take<float>(width * width),
          .squares = scratch.take<double>(width),
          .mean = scratch.take<double>(width),
          .largest = scratch.take<float>(width)};
}

struct Moments {
  double largest;   // magnitude; NaN if there is a NaN
  double crest;     // largest over root mean square
  double outliers;  // share of elements beyond kOutlier root mean squares
  double mean;      // norm of the mean row over the root mean square norm of the rows
};

constexpr double kOutlier = 6;

// Of count rows; all NaN if there are none.
Moments moments(const cpu::Rows& rows, std::int64_t count, const MomentsScratch& scratch);

// gram [dim][dim] = X^T X, X the rows, less their mean if centred. Products of up to 256 rows are summed in float32,
// those sums in float64.
void gram(const cpu::Rows& rows, std::int64_t count, bool centred, const MomentsScratch& scratch, double* gram);

}  // namespace adaattn::measure
