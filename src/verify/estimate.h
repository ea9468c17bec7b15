// A head's relative error from the rows that were also run exactly, with a limit that it stays below with confidence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace adaattn {

// Sums over probe rows of x = ||o - o*||^2 and y = ||o*||^2.
struct ProbeSums {
  double rows = 0, x = 0, y = 0, xx = 0, xy = 0, yy = 0;

  constexpr void add(double error, double norm) {
    rows += 1;
    x += error;
    y += norm;
    xx += error * error;
    xy += error * norm;
    yy += norm * norm;
  }
};

struct ErrorEstimate {
  double value;  // ||O - O*||_F / ||O*||_F
  double limit;  // value's upper confidence limit
};

// Standard errors above the estimate of the squared error that count as its limit.
constexpr double kConfidence = 3;

// Two estimators of the squared relative error (Cochran, Sampling Techniques, 1977, chapters 2 and 6): the ratio of
// the sums, which suits errors that go with their row's norm, and the mean error over the head's own norm per row,
// which does not depend on how the norm is spread. The one with the larger limit counts, so that errors in few rows
// and norms in few rows both make the estimate careful. head_norm: squared, of all rows; 0 if it is not known.
// A template, so that it may be constexpr, and run on devices, with compilers that know no constant square roots.
template <typename Number = double>
constexpr ErrorEstimate estimate_error(const ProbeSums& s, std::type_identity_t<Number> head_rows,
                                       std::type_identity_t<Number> head_norm) {
  if (s.x == 0) return {0, 0};
  const double n = s.rows, ratio = s.x / s.y;
  const double spread = std::max(0.0, s.xx - 2 * ratio * s.xy + ratio * ratio * s.yy);
  const double ratio_limit = ratio + kConfidence * std::sqrt(spread * n / std::max(1.0, n - 1)) / s.y;
  ErrorEstimate estimate = {std::sqrt(ratio), std::sqrt(ratio_limit)};
  if (head_norm > 0) {
    const double mean = s.x / n, share = head_rows / head_norm;
    const double variance = std::max(0.0, s.xx / n - mean * mean) / std::max(1.0, n - 1);
    const double limit = share * (mean + kConfidence * std::sqrt(variance));
    if (limit > ratio_limit) estimate = {std::sqrt(share * mean), std::sqrt(limit)};
  }
  return estimate;  // NaN where a row is
}

// Whether a limit over the budget may come below it with twice the rows: a standard error falls by the root of 2.
inline bool promises(const ErrorEstimate& estimate, double error) {
  return estimate.value + (estimate.limit - estimate.value) * 0.75 <= error;
}

constexpr bool accepts(const ErrorEstimate& estimate, double error) { return estimate.limit <= error; }  // not NaN

}  // namespace adaattn
