#include "cpu/precision_trials.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "plan/ladder.h"

namespace adaattn::cpu {
namespace {

// Of a budget: errors at a glance from which on a precision is not tried, and from which on there is doubt. Of those
// 606 heads few with such errors hold the budget on trial rows: in int8 6 of 69 at 3e-2 and 1 of 345 at 1e-2; in
// bfloat16 1 of 31 at 1e-2, where there was doubt 2 of 51, and of 3e-3, of which 0.6 may be used, none of 435, 1 of 51.
// Scores off by more than kLargestScoreError hold it for 1 of 100.
constexpr double kHopelessInt8 = 1.2, kHopelesslyTight = 0.9, kHopelessBFloat16 = 1;
constexpr double kDoubtful = 0.7, kHopelessTwice = 0.85;
// Of a budget. Rows of one key hide that their scores are off until two keys come close in one of them, and trial
// rows seldom hold one. Heads of language models stay below 4 where they are within their budget, but for one at 10;
// logits of hundreds in bfloat16, which missed 1e-2 by 2.5 times, come to 26.
constexpr double kLargestScoreError = 6;
// Of a budget. Of 137 heads of SmolLM2 whose limit on 32 rows let them run in bfloat16 at 1e-2, 7 missed: 1 of the
// 111 whose limit was below this.
constexpr double kSurely = 0.8;
constexpr double kSure = 0.95;  // of it, that the limit may take on twice as many rows

}  // namespace

// Errors on the rows of a part of the head; 0 of a precision that is not asked for.
Looks PrecisionTrials::look(std::int64_t part, Copies asked) {
  const RowSet rows = rows_at_a_glance(*engine_.args, part);
  std::int64_t keys = std::min(head_.k.shape[2] / part, key_count(head_, 0));
  if (!(asked.int8 || asked.bfloat16) || rows.count == 0 || keys < kTrialRows) return {};
  const std::int64_t* const lengths = head_.key_lengths;
  const double before = state_.work;
  if (head_.options.causal == 0) head_.key_lengths = &keys;  // a causal row sees few of itself
  run_exactly(rows, scratch_.exact, scratch_.exact_lse);
  const auto error_in = [&](std::int32_t precision) {
    run_by(dense_plan(precision), rows, scratch_.tried, scratch_.tried_lse);
    const bool off = score_error(rows.count) > kLargestScoreError * error_;
    return off ? std::numeric_limits<double>::infinity() : compare(rows.count);
  };
  Looks found;
  if (asked.int8) found.int8 = error_in(ADAATTN_PRECISION_INT8);
  if (asked.bfloat16) found.bfloat16 = error_in(ADAATTN_PRECISION_BFLOAT16);
  head_.key_lengths = lengths;
  state_.work = before + (state_.work - before) / static_cast<double>(part);  // rows count as if they saw all others do
  return found;
}

Looks PrecisionTrials::glance() {
  const Looks first = look(kGlance, engine_.parts.copies);
  Looks found;
  if (first.int8 > kHopelessInt8 * error_) found.int8 = first.int8;
  const double most = (error_ < kTightBudget ? kHopelesslyTight : kHopelessBFloat16) * error_;
  if (first.bfloat16 > most) found.bfloat16 = first.bfloat16;
  if (first.bfloat16 > most || !(first.bfloat16 > kDoubtful * most)) return found;
  const Looks second = look(kGlance / 2, {.int8 = false, .bfloat16 = true});
  const double both = std::sqrt((first.bfloat16 * first.bfloat16 + second.bfloat16 * second.bfloat16) / 2);
  if (both > kHopelessTwice * most) found.bfloat16 = both;
  return found;
}

double PrecisionTrials::try_dense(std::int32_t precision, const RowSet& rows) {
  run_by(dense_plan(precision), rows, scratch_.tried, scratch_.tried_lse);
  if (score_error(rows.count) > kLargestScoreError * error_) return std::numeric_limits<double>::infinity();
  ErrorEstimate found = estimate(rows.count);
  if (found.limit > kSurely * error_ && found.value <= kAlone * error_ && error_ >= kTightBudget) {
    const RowSet others = trial_rows(engine_, 1);
    const std::int64_t size = rows.count * head_.v.shape[3];
    if (!others_are_run_) run_exactly(others, scratch_.exact + size);
    others_are_run_ = true;
    run_by(dense_plan(precision), others, scratch_.tried + size);
    found = estimate(rows.count + others.count);
    found.limit /= kSure;
  }
  return std::max(found.value, kAlone * found.limit) * (error_ < kTightBudget ? 1.25 : 1);
}

}  // namespace adaattn::cpu
