#include "cpu/probes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/trial_rows.h"

namespace adaattn::cpu {
namespace {

// The first set, and those between them, of which there are none if the first are neighbours.
RowSet probe_rows(const Engine& engine, int set) {
  const std::int64_t all = engine.args->q.shape[2];
  RowSet rows = spaced_rows(engine, std::clamp<std::int64_t>(all / 32, kTrialRows, kProbeRows));
  if (set == 0) return rows;
  rows.first += rows.step / 2;
  rows.count = rows.step == 1 ? 0 : std::min(rows.count, (all - 1 - rows.first) / rows.step + 1);
  return rows;
}

void run_set(const Engine& engine, std::int64_t index, int thread, int set) {
  TrialRows(engine, index, thread).run_exactly(probe_rows(engine, set), engine.probes_of(index, set));
  engine.states[index].probe_sets = set + 1;
}

template <class Counts>
void add_set(const Engine& engine, std::int64_t index, int set, ProbeSums& sums, Counts counts) {
  const adaattn_forward_args head = head_of(*engine.args, engine.head(index));
  const float* exact = engine.probes_of(index, set);
  const std::int64_t dv = head.v.shape[3];
  const RowSet rows = probe_rows(engine, set);
  for (std::int64_t i = 0; i < rows.count; ++i) {
    if (!counts(rows.first + i * rows.step)) continue;
    double error = 0, norm = 0;
    for (std::int64_t c = 0; c < dv; ++c) {
      const float truth = exact[i * dv + c], got = load(head.out, 0, 0, rows.first + i * rows.step, c);
      float rounded = 0;
      store_element(&rounded, 0, head.out.dtype, truth);
      const double difference = static_cast<double>(got) - truth;
      const double rounding = static_cast<double>(load_element(&rounded, 0, head.out.dtype)) - truth;
      error += difference * difference - rounding * rounding;
      norm += static_cast<double>(truth) * truth;
    }
    sums.add(std::isnan(error) ? error : std::max(0.0, error), norm);
  }
}

constexpr auto kAllRows = [](std::int64_t) { return true; };

double squared_norm(const adaattn_tensor& out) {  // of one head
  constexpr std::int64_t kSums = 8;               // one would wait for every addition
  double sums[kSums] = {};
  const bool is_plain = out.dtype == ADAATTN_FLOAT32 && out.stride[3] == 1;
  const auto* const data = static_cast<const float*>(out.data);
  for (std::int64_t row = 0; row < out.shape[2]; ++row) {
    const float* const values = is_plain ? data + offset_of(out, 0, 0, row, 0) : nullptr;
    for (std::int64_t first = 0; first < out.shape[3]; first += kSums) {
      const std::int64_t count = std::min(kSums, out.shape[3] - first);
      if (is_plain && count == kSums) {
        for (std::int64_t i = 0; i < kSums; ++i) sums[i] += static_cast<double>(values[first + i]) * values[first + i];
        continue;
      }
      for (std::int64_t i = 0; i < count; ++i) {
        const double value = load(out, 0, 0, row, first + i);
        sums[i] += value * value;
      }
    }
  }
  return std::accumulate(sums, sums + kSums, 0.0);
}

}  // namespace

void run_probes(const Engine& engine, std::int64_t index, int thread) { run_set(engine, index, thread, 0); }

ErrorEstimate probe_error(const Engine& engine, std::int64_t index, int thread) {
  const HeadState& state = engine.states[index];
  const auto rows = static_cast<double>(engine.args->q.shape[2]);
  const double error = engine.args->options.error, norm = squared_norm(head_of(*engine.args, engine.head(index)).out);
  ProbeSums sums;
  for (int set = 0; set < state.probe_sets; ++set) add_set(engine, index, set, sums, kAllRows);
  const ErrorEstimate found = estimate_error(sums, rows, norm);
  if (state.probe_sets == kProbeSets || accepts(found, error) || !promises(found, error)) return found;
  if (probe_rows(engine, 1).count == 0) return found;
  run_set(engine, index, thread, 1);
  add_set(engine, index, 1, sums, kAllRows);
  return estimate_error(sums, rows, norm);
}

SampledError sampled_error(const Engine& engine, std::int64_t index, std::int64_t block) {
  const std::int64_t rows = engine.args->q.shape[2], blocks = (rows + block - 1) / block;
  ProbeSums sums;
  for (int set = 0; set < engine.states[index].probe_sets; ++set)
    add_set(engine, index, set, sums, [&](std::int64_t row) { return is_sampled(blocks - 1 - row / block); });
  return {estimate_error(sums, static_cast<double>(rows), 0), sums.rows};
}

}  // namespace adaattn::cpu
