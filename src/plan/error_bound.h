// Upper bounds on how far attention with summarised tiles, computed in floating point, lies from the truth.
//
// Structure. Let p be a row's exponentials in a tile of n keys, m their sum and vbar the mean of the tile's v. Where
// m * vbar stands for p^T V, the row of exponentials times v is wrong by (p - m / n)^T (V - vbar), at most
// ||p - m / n|| * sigma, sigma the largest singular value of V - vbar; ||p - m / n||^2 = sum p^2 - m^2 / n. A row's
// error is at most the sum of that over its summarised tiles, over its sum of exponentials.
//
// Rounding. If every score is off by at most delta, and o is the row's exact result, what it moves by is
//   sum_j p_j (e^delta_j - 1) (v_j - o) / sum_j p_j e^delta_j, at most e^(2 delta) - e^delta times sum_j p_j |v_j - o|,
// and that mean distance is at most max |v_j| (it is at most the root of the variance), and at most 4 tail max |v_j|
// with tail = 1 - max_j p_j. A sum of n rounded products is off by sqrt(n) u |q| |k| root mean square in the model of
// Higham and Mary (SIAM J. Sci. Comput. 41(5), 2019: rounding errors are independent of mean 0); we allow 4 times
// that, which a single sum exceeds with a probability below 7e-4, and a head's bound, an average over all of its rows
// and keys, in effect never. The worst case would be n u |q| |k|, no more than 3 times as much for D = 128.
#pragma once

#include <cmath>

namespace adaattn {

constexpr double kFloat32Unit = 0x1p-24, kFloat64Unit = 0x1p-53;

// What rounding can do to a row of the output, in the units of v: score_size is scale * |q| * max |k|, value_size
// max |v|, dim the length of the scores' sums, depth that of the sums over keys between two compensated additions, unit
// half the distance from 1 to the next larger number.
inline double rounding_bound(double score_size, double tail, double value_size, double dim, double depth, double unit) {
  constexpr double kConfidence = 4;
  // The scale, its product with q, and the sum; an exponential is good to 17 units (1e-6 in float32: 1.4e-7 of the
  // polynomial, the rest from rounding its argument, weighted with p log2(p), which sums to at most log2(keys) < 30).
  const double delta = unit * ((kConfidence * std::sqrt(dim) + 3) * score_size + 17);
  const double moved = std::exp(delta) * std::expm1(delta) * std::fmin(1, 4 * (tail + 4 * unit));
  const double summed = unit * (kConfidence * std::sqrt(depth) + 8);  // p v, its compensated sum, and the division
  return (moved + summed) * value_size;
}

// Of a head: the norm of its error over that of the truth, from an upper bound of the error's norm and the norm of what
// was computed. Infinite if nothing is known.
inline double relative_bound(double error, double norm) {
  if (error == 0) return 0;
  return norm > error ? error / (norm - error) : HUGE_VAL;
}

// The error, relative to the norm of what is computed, that keeps relative_bound below the budget, with room for the
// rounding and for a norm that was only estimated.
inline double planned_error(double budget) { return 0.95 * budget / (1 + budget); }

}  // namespace adaattn
