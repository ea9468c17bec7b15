// Some rows of a head, run exactly and by a plan: what its error is judged by.
#pragma once

#include <cstdint>

#include "cpu/engine.h"

namespace adaattn::cpu {

// count rows of a head from first on, step apart.
struct RowSet {
  std::int64_t first, step, count;
};

// Evenly spaced, an odd number of rows apart: they then stand at every place of a panel, and a row at its edge errs
// differently from one in its middle.
RowSet spaced_rows(const Engine& engine, std::int64_t count);

// kTrialRows rows that precisions are tried on, and as many more. Under a causal mask those in the first half of the
// sequence come first: they cost half. (Rounding errs everywhere alike.)
RowSet trial_rows(const Engine& engine, int set);

// A panel in the middle of one of kPilotPanels equal parts of the sequence.
RowSet pilot_rows(const Engine& engine, std::int64_t panel);

// A first look at precisions, within budgets below kLooseBudget: kTrialRows rows in the second half of a part of the
// queries, the first kGlance-th or twice as many, and the keys that they see, without a causal mask as large a part.
constexpr std::int64_t kGlance = 16;
constexpr double kLooseBudget = 5e-2;
RowSet rows_at_a_glance(const adaattn_forward_args& args, std::int64_t part);  // count 0 if there is none
std::int64_t keys_at_a_glance(const adaattn_forward_args& args);               // at most

// Of one head and thread. Results lie in the thread's scratch; the work is added to the head's.
class TrialRows {
 public:
  TrialRows(const Engine& engine, std::int64_t index, int thread);

  void run_exactly(const RowSet& set, float* out, float* lse = nullptr);
  TileCounts run_by(const adaattn_head_plan& plan, const RowSet& set, float* out, float* lse = nullptr);

 protected:
  // Rows of scratch.tried against those of scratch.exact.
  ProbeSums sums_of(std::int64_t first, std::int64_t count) const;
  ErrorEstimate estimate(std::int64_t rows) const;
  double compare(std::int64_t rows) const { return estimate(rows).value; }

  // Of the scores that lead their rows, root mean square: where one key has all of a row its log-sum-exp errs as its
  // score does, however little the output shows of it.
  double score_error(std::int64_t rows) const;

  double share(std::int64_t rows) const {
    return static_cast<double>(rows) / static_cast<double>(engine_.args->q.shape[2]);
  }

  const Engine& engine_;
  std::int64_t index_;
  HeadState& state_;
  const ThreadScratch& scratch_;
  adaattn_forward_args head_;
};

}  // namespace adaattn::cpu
