#include "cpu/trial_rows.h"

#include <algorithm>
#include <cmath>

#include "cpu/forward.h"

namespace adaattn::cpu {

RowSet spaced_rows(const Engine& engine, std::int64_t count) {
  const std::int64_t rows = engine.args->q.shape[2];
  count = std::min(count, rows);
  const std::int64_t step = (rows / count - 1) | 1;
  return {.first = (rows - 1 - step * (count - 1)) / 2, .step = step, .count = count};
}

RowSet trial_rows(const Engine& engine, int set) {
  const std::int64_t rows = engine.args->q.shape[2];
  if (engine.args->options.causal != 0 && rows >= 4 * kTrialRows) {
    const std::int64_t half = rows / 2, step = (half / kTrialRows - 1) | 1;
    return {.first = set * half + (half - 1 - step * (kTrialRows - 1)) / 2, .step = step, .count = kTrialRows};
  }
  RowSet trial = spaced_rows(engine, kTrialRows);
  if (set == 0) return trial;
  trial.first += trial.step / 2;
  trial.count = std::min(trial.count, (rows - 1 - trial.first) / trial.step + 1);
  return trial;
}

RowSet pilot_rows(const Engine& engine, std::int64_t panel) {
  const std::int64_t panels = engine.args->q.shape[2] / kLanes;
  return {.first = (2 * panel + 1) * panels / (2 * kPilotPanels) * kLanes, .step = 1, .count = kLanes};
}

RowSet rows_at_a_glance(const adaattn_forward_args& args, std::int64_t part) {
  const std::int64_t end = args.q.shape[2] / part, step = std::max<std::int64_t>(1, end / 2 / kTrialRows - 1) | 1;
  const RowSet rows = {.first = end - 1 - step * (kTrialRows - 1), .step = step, .count = kTrialRows};
  const bool pays = args.options.error < kLooseBudget && rows.first >= 0 && args.k.shape[2] / part >= kTrialRows;
  return pays ? rows : RowSet{};
}

std::int64_t keys_at_a_glance(const adaattn_forward_args& args) {
  const RowSet rows = rows_at_a_glance(args, kGlance / 2);
  if (rows.count == 0) return 0;
  if (args.options.causal == 0) return args.k.shape[2] / (kGlance / 2);
  const std::int64_t last = rows.first + rows.step * (rows.count - 1);
  return visible_keys(make_visibility(args.options, args.q.shape[2], args.k.shape[2]), last, last).end;
}

TrialRows::TrialRows(const Engine& engine, std::int64_t index, int thread)
    : engine_(engine),
      index_(index),
      state_(engine.states[index]),
      scratch_(engine.scratch[thread]),
      head_(head_of(*engine.args, engine.head(index))) {}

void TrialRows::run_exactly(const RowSet& set, float* out, float* lse) {
  const RowsProblem rows(head_, set.first, set.step, set.count, out, lse);
  for (std::int64_t task = 0; task < rows.plan.tasks; ++task) run_forward_task(rows.plan, task, scratch_.forward);
  state_.work += share(set.count);
}

TileCounts TrialRows::run_by(const adaattn_head_plan& plan, const RowSet& set, float* out, float* lse) {
  const RowsProblem rows(head_, set.first, set.step, set.count, out, lse);
  TileCounts counts;
  for (std::int64_t task = 0; task < rows.plan.tasks; ++task)
    run_tiled_task(rows.plan, task, engine_.keys_of(index_), plan, scratch_.forward, scratch_.tiled, counts);
  state_.work += share(set.count) * cost_share(counts, plan, engine_.work_of(index_));
  return counts;
}

ProbeSums TrialRows::sums_of(std::int64_t first, std::int64_t count) const {
  ProbeSums sums;
  const std::int64_t dv = head_.v.shape[3];
  for (std::int64_t row = first; row < first + count; ++row) {
    double error = 0, norm = 0;
    for (std::int64_t i = row * dv; i < (row + 1) * dv; ++i) {
      const double difference = static_cast<double>(scratch_.tried[i]) - scratch_.exact[i];
      error += difference * difference;
      norm += static_cast<double>(scratch_.exact[i]) * scratch_.exact[i];
    }
    sums.add(error, norm);
  }
  return sums;
}

ErrorEstimate TrialRows::estimate(std::int64_t rows) const {
  return estimate_error(sums_of(0, rows), static_cast<double>(rows), 0);
}

double TrialRows::score_error(std::int64_t rows) const {
  double sum = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    const double difference = static_cast<double>(scratch_.tried_lse[row]) - scratch_.exact_lse[row];
    if (std::isfinite(difference)) sum += difference * difference;  // a row may see no key
  }
  return std::sqrt(sum / static_cast<double>(rows));
}

}  // namespace adaattn::cpu
