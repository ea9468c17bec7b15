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

RowSet pilot_rows(const Engine& engine, std::int64_t panel) {
  const std::int64_t panels = engine.args->q.shape[2] / kLanes;
  return {.first = (2 * panel + 1) * panels / (2 * kPilotPanels) * kLanes, .step = 1, .count = kLanes};
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
