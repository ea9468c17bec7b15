#include "cpu/pilot.h"

#include <limits>

#include "cpu/droppable.h"
#include "cpu/forward.h"
#include "plan/ladder.h"

namespace adaattn::cpu {
namespace {

// Some rows of a head: count from first on, step apart.
struct RowSet {
  std::int64_t first, step, count;
};

// Evenly spaced, an odd number of rows apart: they then stand at every place of a panel, and a row at its edge errs
// differently from one in its middle.
RowSet spaced_rows(const Engine& engine, std::int64_t count) {
  const std::int64_t rows = engine.args->q.shape[2];
  count = std::min(count, rows);
  const std::int64_t step = (rows / count - 1) | 1;
  return {.first = (rows - 1 - step * (count - 1)) / 2, .step = step, .count = count};
}

RowSet probe_rows(const Engine& engine) {
  return spaced_rows(engine, std::clamp<std::int64_t>(engine.args->q.shape[2] / 32, kTrialRows, kProbeRows));
}

// A panel in the middle of one of kPilotPanels equal parts of the sequence.
RowSet pilot_rows(const Engine& engine, std::int64_t panel) {
  const std::int64_t panels = engine.args->q.shape[2] / kLanes;
  return {.first = (2 * panel + 1) * panels / (2 * kPilotPanels) * kLanes, .step = 1, .count = kLanes};
}

// One head while it is planned.
class Pilot {
 public:
  Pilot(const Engine& engine, std::int64_t index, int thread)
      : engine_(engine),
        index_(index),
        state_(engine.states[index]),
        scratch_(engine.scratch[thread]),
        head_(head_of(*engine.args, engine.head(index))),
        error_(engine.args->options.error) {}

  // The caller's plan, or a dense one in the cheapest precision.
  void begin() {
    state_ = {.plan = dense_plan(ADAATTN_PRECISION_FLOAT32),
              .done = false,
              .estimate = {},
              .counts = {},
              .work = 0,
              .escalations = 0,
              .dense_precision = ADAATTN_PRECISION_FLOAT32,
              .failed = 0,
              .tight = error_ < kTightBudget,
              .may_be_tiled = false,
              .precisions = {},
              .best = 1 - kLeastGain};
    if (!*engine_.keys_of(index_).finite) return;
    const adaattn_head_plan* given = engine_.args->plans;
    if (given != nullptr && given[engine_.head(index_)].form != ADAATTN_AUTOMATIC)
      take(given[engine_.head(index_)]);
    else
      choose_precisions();
  }

  // Whether a screen may pay. At tight budgets it seldom does: then only where a late panel could do without twice the
  // tiles that it would have to leave out. (Of 191 heads, most of them gpt8k's and SmolLM2's, those 34 that were tiled
  // at 3e-3 could do without two thirds of their tiles or more, and 97 of the others without less than half.)
  bool wants_screen() {
    if (is_screened(state_.plan)) return true;
    if (!state_.may_be_tiled || !state_.tight) return state_.may_be_tiled;
    const std::int64_t head = engine_.head(index_), heads = engine_.args->q.shape[1];
    state_.work += share(kLanes) / 6;  // a third of a panel's scores
    return droppable_share(*engine_.args, head / heads, head % heads, tiled_plan(error_, 0, state_.precisions).screen,
                           scratch_.key_head) >= 2 * kLeastTightlyDropped;
  }

  // A tiled plan if one costs less, and the exact probe rows.
  void finish() {
    if (state_.may_be_tiled) choose_tiles();
    if (is_dense_float32(state_.plan)) return;
    run_exactly(probe_rows(engine_), engine_.probes_of(index_));
  }

 private:
  struct Choice {
    adaattn_head_plan plan;
    double cost;
  };

  void take(const adaattn_head_plan& plan) {
    // Thresholds are of tiled heads: a policy leaves them in place when it has a head run dense.
    state_.plan = plan.form == ADAATTN_DENSE ? dense_plan(plan.precision) : plan;
    if (plan.form != ADAATTN_LOW_RANK) return;
    if (!build(plan.rank)) state_.plan = dense_plan(ADAATTN_PRECISION_FLOAT32);
  }

  void consider(const adaattn_head_plan& plan, double cost) {
    if (cost > state_.best) return;
    state_.best = cost;
    state_.plan = plan;
  }

  void choose_precisions() {
    const double none = std::numeric_limits<double>::infinity();
    double int8 = none, bfloat16 = none;
    const Copies& copies = engine_.parts.copies;
    const bool may_be_low_rank = engine_.coreset_keys > 0 && engine_.args->plans == nullptr;
    const RowSet rows = spaced_rows(engine_, kTrialRows);
    if (copies.int8 || copies.bfloat16 || may_be_low_rank) run_exactly(rows, scratch_.exact, scratch_.exact_lse);
    if (copies.int8 || copies.bfloat16) {
      if (copies.int8) int8 = try_dense(ADAATTN_PRECISION_INT8, rows);
      if (copies.bfloat16)  // no need to ask where ten times its rounding is nothing
        bfloat16 = error_ >= kLooseBudget ? 0x1p-9 : try_dense(ADAATTN_PRECISION_BFLOAT16, rows);
      if (bfloat16 <= kAlone * error_) {
        state_.dense_precision = ADAATTN_PRECISION_BFLOAT16;
        consider(dense_plan(ADAATTN_PRECISION_BFLOAT16), dense_cost(ADAATTN_PRECISION_BFLOAT16));
      }
      if (int8 <= kAlone * error_) consider(dense_plan(ADAATTN_PRECISION_INT8), dense_cost(ADAATTN_PRECISION_INT8));
    }
    if (may_be_low_rank) {
      const auto [plan, cost] = search_coresets(rows, state_.best);
      if (plan.form == ADAATTN_LOW_RANK) return consider(plan, cost);
    }
    state_.precisions = precisions_for(error_, int8, bfloat16);
    state_.tight = state_.tight || (copies.bfloat16 && state_.precisions.high == ADAATTN_PRECISION_FLOAT32);
    state_.may_be_tiled = engine_.long_enough();
  }

  void choose_tiles() {
    const Precisions& precisions = state_.precisions;
    const KeyHead& keys = engine_.keys_of(index_);
    const bool screened = keys.screened && *keys.energy >= kLeastEnergy && leaves_out(precisions);
    // Without a screen nothing tells tiles apart before they are scored: then all are low, or nothing is to be had.
    if (!screened && (precisions.low_share < 0 || engine_.args->k.shape[2] < kLeastUnscreened)) return;
    const auto [plan, cost] = search(precisions, screened);
    if (cost < worthwhile()) consider(plan, cost);
  }

  // What tiles must cost at most.
  double worthwhile() const { return (1 - (state_.tight ? kLeastTightGain : kLeastTiledGain)) * state_.best; }

  double dense_cost(std::int32_t precision) const {
    TileCounts all{};
    all.visible = all.high = 1;
    return cost_share(all, dense_plan(precision), engine_.time);
  }

  // The error on those rows, or more where its confidence limit says so: at most kAlone * e only if the limit is below
  // e. Where that is close, as many rows between them are looked at, too.
  double try_dense(std::int32_t precision, const RowSet& rows) {
    run_by(dense_plan(precision), rows, scratch_.tried, scratch_.tried_lse);
    if (score_error(rows.count) > kLargestScoreError * error_) return std::numeric_limits<double>::infinity();
    ErrorEstimate found = estimate(rows.count);
    if (found.limit > kSurely * error_ && found.value < error_ && error_ >= kTightBudget) {
      const std::int64_t first = rows.first + rows.step / 2;
      const RowSet between = {.first = first,
                              .step = rows.step,
                              .count = std::min(rows.count, (engine_.args->q.shape[2] - 1 - first) / rows.step + 1)};
      const std::int64_t size = rows.count * head_.v.shape[3];
      run_exactly(between, scratch_.exact + size);
      run_by(dense_plan(precision), between, scratch_.tried + size);
      found = estimate(rows.count + between.count);
      found.limit /= kSure;
    }
    return std::max(found.value, kAlone * found.limit) * (error_ < kTightBudget ? 1.25 : 1);
  }

  // Of the scores that lead their rows, root mean square: where one key has all of a row its log-sum-exp errs as its
  // score does, however little the output shows of it.
  double score_error(std::int64_t rows) const {
    double sum = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const double difference = static_cast<double>(scratch_.tried_lse[row]) - scratch_.exact_lse[row];
      if (std::isfinite(difference)) sum += difference * difference;  // a row may see no key
    }
    return std::sqrt(sum / static_cast<double>(rows));
  }

  // Whether the loosest screen leaves out enough for a look, and enough of a cost of so much where the budget is tight:
  // else a head is settled at the price of the screen.
  bool leaves_out(const Precisions& precisions) {
    const adaattn_head_plan plan =
        tiled_plan(error_, state_.tight ? 1 : 0, precisions);  // a level is added to tight ones
    TileCounts counts;
    for (std::int64_t panel = 0; panel < kPilotPanels; ++panel) {
      const RowSet set = pilot_rows(engine_, panel);
      const RowsProblem rows(head_, set.first, set.step, set.count, scratch_.tried);
      run_screen_task(rows.plan, 0, engine_.keys_of(index_), plan, scratch_.forward, scratch_.tiled, counts);
    }
    state_.work += share(kPilotRows) * engine_.work_of(index_).screen / 2;
    const double dropped = static_cast<double>(counts.dropped) / static_cast<double>(counts.visible);
    if (!state_.tight) return dropped >= kLeastDropped;
    return dropped >= kLeastTightlyDropped && cost_share(counts, plan, engine_.time_of(index_)) < worthwhile();
  }

  // Fills the head's coreset; false if there is none.
  bool build(std::int64_t rank) {
    const std::int64_t head = engine_.head(index_), b = head / engine_.args->q.shape[1],
                       h = head % engine_.args->q.shape[1];
    return build_coreset(*engine_.args, b, h / engine_.group, static_cast<std::size_t>(rank), scratch_.coreset,
                         engine_.coresets[index_]);
  }

  // Error of attention over a coreset of that many keys on rows that were run exactly; infinite if there is none.
  double try_coreset(std::int64_t rank, const RowSet& rows) {
    if (!build(rank)) return std::numeric_limits<double>::infinity();
    const RowsProblem problem(head_, rows.first, rows.step, rows.count, scratch_.tried);
    const std::int64_t failed =
        attend_coreset(rows_of(problem.args.q, 0, 0, 0), rows.count, problem.plan.scale, engine_.coresets[index_],
                       scratch_.coreset, rows_of(problem.args.out, 0, 0, 0), nullptr);
    state_.work += coreset_work(head_, rank).build /
                   (static_cast<double>(head_.q.shape[2]) * static_cast<double>(head_.k.shape[2]) *
                    static_cast<double>(head_.q.shape[3] + head_.v.shape[3]));
    return failed > 0 ? std::numeric_limits<double>::infinity() : compare(rows.count);
  }

  Choice search_coresets(const RowSet& rows, double best) {
    const Choice none = {dense_plan(ADAATTN_PRECISION_FLOAT32), 1};
    if (try_coreset(std::min<std::int64_t>(kFirstCoreset, static_cast<std::int64_t>(engine_.coreset_keys)), rows) >
        kHopelessError)
      return none;
    for (auto rank = static_cast<std::int64_t>(engine_.coreset_keys) / 4;
         rank <= static_cast<std::int64_t>(engine_.coreset_keys); rank *= 2) {
      const double cost = low_rank_share(head_, rank, kBuildTime);
      if (cost > best) return none;
      if (try_coreset(rank, rows) <= kPilotShare * error_)
        return {low_rank_plan(static_cast<std::int32_t>(rank)), cost};
    }
    return none;
  }

  Choice search(const Precisions& precisions, bool screened) {
    const std::int64_t size = kLanes * head_.v.shape[3];
    for (std::int64_t panel = 0; panel < kPilotPanels; ++panel)
      run_exactly(pilot_rows(engine_, panel), scratch_.exact + panel * size);
    const auto plan_at = [&](int level) {
      adaattn_head_plan plan = tiled_plan(error_, level, precisions);
      if (!screened) plan.screen = kNever;
      return plan;
    };
    LevelSearch levels;
    if (!screened || state_.tight) levels.high = kFewLevels;
    Choice best = {dense_plan(ADAATTN_PRECISION_FLOAT32), 1};
    while (!levels.done()) {
      const adaattn_head_plan plan = plan_at(levels.next());
      const auto [error, cost] = try_tiles(plan);
      if (cost > worthwhile()) {  // more careful ones save less
        levels.high = levels.next();
        continue;
      }
      const bool accepted = accepts_pilot(error);
      if (accepted) best = {plan, cost};
      levels.record(accepted);
    }
    // A few panels see little of errors that lie in few rows, as those of tight budgets do: then a level is added.
    if (best.plan.form == ADAATTN_TILED && state_.tight) best.plan = plan_at(levels.high + 1);
    // Pooling what a looser screen leaves out may hold the budget for less.
    if (screened && levels.high > 0 && levels.high < kRuleLevels && !state_.tight) {
      adaattn_head_plan plan = plan_at(levels.high - 1);
      plan.pooled = 1;
      const auto [error, cost] = try_tiles(plan);
      if (accepts_pilot(error) && cost < best.cost) best = {plan, cost};
    }
    return best;
  }

  struct Tried {
    ErrorEstimate error;
    double cost;
  };
  Tried try_tiles(const adaattn_head_plan& plan) {
    const std::int64_t size = kLanes * head_.v.shape[3];
    TileCounts counts;
    for (std::int64_t panel = 0; panel < kPilotPanels; ++panel)
      counts = add(counts, run_by(plan, pilot_rows(engine_, panel), scratch_.tried + panel * size));
    return {estimate(kPilotRows), cost_share(counts, plan, engine_.time_of(index_))};
  }

  bool accepts_pilot(const ErrorEstimate& found) const {
    return found.value <= kPilotShare * error_ && accepts(found, kPilotLimit * error_);
  }

  double share(std::int64_t rows) const {
    return static_cast<double>(rows) / static_cast<double>(engine_.args->q.shape[2]);
  }

  void run_exactly(const RowSet& set, float* out, float* lse = nullptr) {
    const RowsProblem rows(head_, set.first, set.step, set.count, out, lse);
    for (std::int64_t task = 0; task < rows.plan.tasks; ++task) run_forward_task(rows.plan, task, scratch_.forward);
    state_.work += share(set.count);
  }

  TileCounts run_by(const adaattn_head_plan& plan, const RowSet& set, float* out, float* lse = nullptr) {
    const RowsProblem rows(head_, set.first, set.step, set.count, out, lse);
    TileCounts counts;
    for (std::int64_t task = 0; task < rows.plan.tasks; ++task)
      run_tiled_task(rows.plan, task, engine_.keys_of(index_), plan, scratch_.forward, scratch_.tiled, counts);
    state_.work += share(set.count) * cost_share(counts, plan, engine_.work_of(index_));
    return counts;
  }

  // The error of what was tried on rows that were run exactly.
  ErrorEstimate estimate(std::int64_t rows) const {
    ProbeSums sums;
    const std::int64_t dv = head_.v.shape[3];
    for (std::int64_t row = 0; row < rows; ++row) {
      double error = 0, norm = 0;
      for (std::int64_t i = row * dv; i < (row + 1) * dv; ++i) {
        const double difference = static_cast<double>(scratch_.tried[i]) - scratch_.exact[i];
        error += difference * difference;
        norm += static_cast<double>(scratch_.exact[i]) * scratch_.exact[i];
      }
      sums.add(error, norm);
    }
    return estimate_error(sums, static_cast<double>(rows), 0);
  }
  double compare(std::int64_t rows) const { return estimate(rows).value; }

  static constexpr std::int64_t kLeastUnscreened = 8192;  // keys
  static constexpr double kLooseBudget = 5e-2;
  static constexpr double kBuildTime = 3;  // of a multiply-add of a coreset's building, over one of attention's
  static constexpr int kFewLevels = 3;     // that are tried where little is to be gained
  static constexpr double kLeastDropped = 0.05;
  // Of a budget. Rows of one key hide that their scores are off until two keys come close in one of them, and trial
  // rows seldom hold one. Heads of language models stay below 4 where they are within their budget, but for one at 10;
  // logits of hundreds in bfloat16, which missed 1e-2 by 2.5 times, come to 26.
  static constexpr double kLargestScoreError = 6;
  // Of a budget. Of 137 heads of SmolLM2 whose limit on 32 rows let them run in bfloat16 at 1e-2, 7 missed: 1 of the
  // 111 whose limit was below this.
  static constexpr double kSurely = 0.8;
  static constexpr double kSure = 0.9;         // of it, that the limit may take on twice as many rows
  static constexpr double kPilotShare = 0.65;  // of the budget that pilot panels may use: they are few
  static constexpr double kPilotLimit = 0.85;  // and that their limit may reach

  const Engine& engine_;
  std::int64_t index_;
  HeadState& state_;
  const ThreadScratch& scratch_;
  adaattn_forward_args head_;
  double error_;
};

}  // namespace

ErrorEstimate probe_error(const Engine& engine, std::int64_t index) {
  const adaattn_forward_args head = head_of(*engine.args, engine.head(index));
  const float* exact = engine.probes_of(index);
  const std::int64_t dv = head.v.shape[3], rows = head.q.shape[2];
  const RowSet set = probe_rows(engine);
  ProbeSums sums;
  for (std::int64_t i = 0; i < set.count; ++i) {
    double error = 0, norm = 0;
    for (std::int64_t c = 0; c < dv; ++c) {
      const float truth = exact[i * dv + c], got = load(head.out, 0, 0, set.first + i * set.step, c);
      float rounded = 0;
      store_element(&rounded, 0, head.out.dtype, truth);
      const double difference = static_cast<double>(got) - truth;
      const double rounding = static_cast<double>(load_element(&rounded, 0, head.out.dtype)) - truth;
      error += difference * difference - rounding * rounding;
      norm += static_cast<double>(truth) * truth;
    }
    sums.add(std::isnan(error) ? error : std::max(0.0, error), norm);
  }
  double head_norm = 0;
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < dv; ++c) {
      const double value = load(head.out, 0, 0, row, c);
      head_norm += value * value;
    }
  return estimate_error(sums, static_cast<double>(rows), head_norm);
}

void plan_heads(const Engine& engine) {
  for_all(engine, engine.wave_heads, [&](std::int64_t i, int thread) { Pilot(engine, i, thread).begin(); });
  if (engine.parts.screen) {
    const adaattn_forward_args& args = *engine.args;
    const float least_energy = args.plans != nullptr ? 0 : kLeastEnergy;
    for_all(engine, engine.wave_heads / engine.group, [&](std::int64_t i, int thread) {
      const std::int64_t key_head = engine.first + i;
      bool wanted = false;
      for (std::int64_t h = i * engine.group; h < (i + 1) * engine.group && !wanted; ++h)
        wanted = Pilot(engine, h, thread).wants_screen();
      if (wanted)
        build_screen(args, key_head / args.k.shape[1], key_head % args.k.shape[1], least_energy,
                     engine.scratch[thread].key_head, engine.keys[i]);
    });
  }
  for_all(engine, engine.wave_heads, [&](std::int64_t i, int thread) { Pilot(engine, i, thread).finish(); });
}

}  // namespace adaattn::cpu
