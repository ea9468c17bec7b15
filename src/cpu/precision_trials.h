// What a head's errors with everything in int8 and in bfloat16 would be, from a few rows.
#pragma once

#include "cpu/trial_rows.h"

namespace adaattn::cpu {

// Of one head and thread, as TrialRows. Errors are relative; infinite where scores are far off.
class PrecisionTrials : public TrialRows {
 public:
  PrecisionTrials(const Engine& engine, std::int64_t index, int thread)
      : TrialRows(engine, index, thread), error_(engine.args->options.error) {}

  // Precisions whose errors are too large already in a short part of the head. Rounding errs there as it does
  // elsewhere: 0.55 to 1.7 times as much on 32 rows of the first sixteenth as on 32 rows of the whole, for nine of ten
  // heads (606 of gpt8k, SmolLM2 and of seeded generators; a quarter of the head tells no more). A sixteenth of the
  // keys, a sixteenth of the price. Where that leaves doubt, other rows, of the first eighth, are asked.
  Looks glance();

  // The error on those trial rows, which were run exactly, or more where its confidence limit says so: at most kAlone *
  // e only if the limit is below e. Where that is close, the other set is looked at, too.
  double try_dense(std::int32_t precision, const RowSet& rows);

 protected:
  double error_;  // the budget

 private:
  Looks look(std::int64_t part, Copies asked);

  bool others_are_run_ = false;  // the second set of trial rows
};

}  // namespace adaattn::cpu
