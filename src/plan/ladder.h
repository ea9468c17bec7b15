// Candidate plans for a head, from the budget and what was measured of the head; the same on every device.
#pragma once

#include <algorithm>
#include <cmath>

#include "plan/head_plan.h"

namespace adaattn {

inline adaattn_head_plan dense_plan(std::int32_t precision) {
  return {.form = ADAATTN_DENSE,
          .precision = precision,
          .low_precision = precision,
          .pooled = 0,
          .rank = 0,
          .screen = kNever,
          .low = kNever,
          .drop = 0};
}

inline adaattn_head_plan low_rank_plan(std::int32_t rank) {
  adaattn_head_plan plan = dense_plan(ADAATTN_PRECISION_FLOAT32);
  plan.form = ADAATTN_LOW_RANK;
  plan.rank = rank;
  return plan;
}

// Coresets are tried from these sizes and budgets on, with up to an eighth of the keys; first with kFirstCoreset of
// them, whose error tells whether more are worth a look. With fewer keys building one takes longer than int8
// everywhere, and a look too many costs a tenth of the head.
constexpr std::int64_t kLeastLowRankKeys = 16384;
constexpr std::int64_t kLeastLowRankGain = 8;
constexpr double kLeastLowRankError = 1e-2;
constexpr std::int64_t kFirstCoreset = 64;
constexpr double kHopelessError = 0.35;

// Tiled plans from the loosest to the most careful; a head that none suits runs dense.
constexpr int kRuleLevels = 8;

// Of what a head's error is made: the precisions that its budget allows, and where low tiles begin.
struct Precisions {
  std::int32_t high, low;
  float low_share;  // natural log, as in adaattn_head_plan.low
};

// Error and cost fall and rise with the level. Thresholds and steps were taken from a grid over heads of an 8,192-token
// language model (docs/decisions/0010-low-precision-on-cpus.md).
//
// Means in place of tiles' values cost a language model more than what else makes an error of that size: at 1e-1
// (gpt8k, 106,483 tokens) summaries took +0.2 to +0.3 % of perplexity, plans without them +0.01 % (standard errors 0.03
// to 0.06). So loose budgets do without.
constexpr double kSummariesUpTo = 0.05;
inline adaattn_head_plan tiled_plan(double error, int level, const Precisions& precisions) {
  const double careful = std::pow(0.45, level);
  return {.form = ADAATTN_TILED,
          .precision = precisions.high,
          .low_precision = precisions.low,
          .pooled = 0,
          .rank = 0,
          .screen = static_cast<float>(std::log(std::fmin(0.8, 48 * std::pow(error, 1.5) * careful))),
          .low = precisions.low_share,
          .drop = error > kSummariesUpTo ? 0.0F : static_cast<float>(std::fmin(0.2, error * careful))};
}

// Which precisions a budget leaves to a head whose errors with everything in int8 and in bfloat16 are these (infinite:
// not to be had). Up to kAlone of the budget may go into precision; a head with more in int8 keeps its best tiles, down
// to half of the best share, in a higher precision.
constexpr double kAlone = 0.75;
inline Precisions precisions_for(double error, double int8_error, double bfloat16_error) {
  constexpr float kHalf = -0.693147F;  // log(0.5)
  const std::int32_t high = bfloat16_error <= kAlone * error ? ADAATTN_PRECISION_BFLOAT16 : ADAATTN_PRECISION_FLOAT32;
  if (int8_error <= kAlone * error) return {high, ADAATTN_PRECISION_INT8, 0};
  if (int8_error <= 4 * error && high == ADAATTN_PRECISION_BFLOAT16) return {high, ADAATTN_PRECISION_INT8, kHalf};
  if (bfloat16_error <= 4 * error && high == ADAATTN_PRECISION_FLOAT32)
    return {high, ADAATTN_PRECISION_BFLOAT16, kHalf};
  return {high, high, kNever};
}

// Errors of tight budgets lie in few rows: trials tell less of them, and what saves little is not worth a miss. A
// budget is tight for a head, too, that bfloat16 alone, where it is to be had, would miss: of 77 heads of SmolLM2 that
// were planned with bfloat16 below half of the best share at 1e-2, 30 missed.
constexpr double kTightBudget = 6e-3;
constexpr double kLeastTightlyDropped = 0.25;  // of the tiles, by a screen

// The same plan, more careful, after it missed its budget; then dense in a precision that is thought good enough, and
// in the end dense in float32. A plan without a screen does not come to need one.
inline adaattn_head_plan more_careful(adaattn_head_plan plan, double estimate, double error, bool tight,
                                      int escalations, std::int32_t dense_precision) {
  if (tight || (plan.form == ADAATTN_DENSE && (plan.precision == dense_precision || escalations > 1)))
    return dense_plan(ADAATTN_PRECISION_FLOAT32);
  if (plan.form != ADAATTN_TILED || !is_screened(plan) || escalations > 1 || !(estimate < 2 * error))
    return dense_plan(dense_precision);
  plan.screen -= 1.2F;
  plan.drop *= 0.3F;
  if (plan.low == 0)
    plan.low = -0.693147F;
  else if (plan.low > kNever)
    plan.low -= 1.2F;
  return plan;
}

// The search for the loosest rule that a head's pilot accepts: bisection over the levels.
struct LevelSearch {
  int low = 0, high = kRuleLevels;  // rules before low are refused, high and those after are accepted (or untried)

  int next() const { return low + (high - low) / 3; }  // a loose rule costs less to try than a careful one
  bool done() const { return low == high; }
  void record(bool accepted) { accepted ? high = next() : low = next() + 1; }
};

// A head leaves float32 only if it saves this share of its time, and is tiled only if that saves kLeastTiledGain of
// the time that is then left: tiles may be misjudged, and the head then runs twice.
constexpr double kLeastGain = 0.1;
constexpr double kLeastTiledGain = 0.25;
constexpr double kLeastTightGain = 0.45;  // of tight budgets

}  // namespace adaattn
