// What a call must give, element by element, and how far rounding may take a correct kernel from it.
//
// Written from the definition and apart from src/: visibility by its words, sums in FP64. The bounds are a running
// error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapter 3) of any kernel that
//   - forms scores, row sums, outputs and gradients in FP32 from the inputs as stored,
//   - evaluates exp to a few units in the last place, and
//   - rounds its results once to the output's dtype.
// With u = 2^-24, a sum of n products has an error of at most gamma(n) times the sum of the magnitudes of its terms.
// The worst case gamma = n u needs every rounding to fall the same way; rounding errors that behave as independent ones
// give gamma = lambda sqrt(n) u, exceeded with a probability of at most 2 exp(-lambda^2 / 2) if every one of them is as
// large as it can be (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4). They are u / sqrt(3) in the
// mean, and partial sums are smaller than sums of magnitudes, so lambda = 3 is more than 5 standard deviations.
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"
#include "problem.h"

namespace adaattn::testing {

struct Quantity {
  std::vector<double> value;  // FP64
  std::vector<double> bound;  // largest |kernel - value|, per element
  explicit Quantity(std::int64_t size = 0) : value(static_cast<std::size_t>(size)), bound(value.size()) {}
};

struct Expected {
  Quantity out, lse, entropy, max_probability;  // [B, Hq, Nq, Dv], then [B, Hq, Nq]
  Quantity dq, dk, dv;                          // only if gradients were asked for
};

// The problem's out must hold O (as the backward pass reads it) if gradients are asked for. Cases of one name are taken
// to be the same and computed once.
const Expected& expect(const cases::Case& c, const Problem& problem, const ForwardArgs& args, bool gradients);

// ||got - want||_F / ||want||_F over one head, and the same for the bounds: what a failing test reports.
struct HeadError {
  double error, allowed;
};
HeadError head_error(const Quantity& want, const std::vector<double>& got, std::int64_t head, std::int64_t head_size);

// "" if every element lies within its bound (and is infinite or NaN just where the expected one is), else the worst.
std::string complaint(const char* name, const Quantity& want, const std::vector<double>& got, std::int64_t head_size);

}  // namespace adaattn::testing
