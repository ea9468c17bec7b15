#include "cpu/pilot.h"

#include <limits>

#include "cpu/droppable.h"
#include "cpu/probes.h"
#include "cpu/trial_rows.h"
#include "plan/ladder.h"

namespace adaattn::cpu {
namespace {

// One head while it is planned.
class Pilot : private TrialRows {
 public:
  Pilot(const Engine& engine, std::int64_t index, int thread)
      : TrialRows(engine, index, thread), thread_(thread), error_(engine.args->options.error) {}

  // The caller's plan, or a dense one in the cheapest precision.
  void begin() {
    state_ = {.plan = dense_plan(ADAATTN_PRECISION_FLOAT32),
              .done = false,
              .estimate = {},
              .counts = {},
              .work = 0,
              .escalations = 0,
              .dense_precision = ADAATTN_PRECISION_FLOAT32,
              .probe_sets = 0,
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
    if (!is_dense_float32(state_.plan)) run_probes(engine_, index_, thread_);
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
    const Hopeless hopeless = glance();
    const bool try_int8 = copies.int8 && hopeless.int8 == 0, try_bfloat16 = copies.bfloat16 && hopeless.bfloat16 == 0;
    if (hopeless.int8 > 0) int8 = hopeless.int8;
    if (hopeless.bfloat16 > 0) bfloat16 = hopeless.bfloat16;
    if (try_int8 || try_bfloat16 || may_be_low_rank) run_exactly(rows, scratch_.exact, scratch_.exact_lse);
    if (try_int8) int8 = try_dense(ADAATTN_PRECISION_INT8, rows);
    if (try_bfloat16)  // no need to ask where ten times its rounding is nothing
      bfloat16 = error_ >= kLooseBudget ? 0x1p-9 : try_dense(ADAATTN_PRECISION_BFLOAT16, rows);
    if (bfloat16 <= kAlone * error_) {
      state_.dense_precision = ADAATTN_PRECISION_BFLOAT16;
      consider(dense_plan(ADAATTN_PRECISION_BFLOAT16), dense_cost(ADAATTN_PRECISION_BFLOAT16));
    }
    if (int8 <= kAlone * error_) consider(dense_plan(ADAATTN_PRECISION_INT8), dense_cost(ADAATTN_PRECISION_INT8));
    if (may_be_low_rank) {
      const auto [plan, cost] = search_coresets(rows, state_.best);
      if (plan.form == ADAATTN_LOW_RANK) return consider(plan, cost);
    }
    state_.precisions = precisions_for(error_, int8, bfloat16);
    state_.tight = state_.tight || (copies.bfloat16 && state_.precisions.high == ADAATTN_PRECISION_FLOAT32);
    state_.may_be_tiled = engine_.long_enough();
  }

  // Errors of precisions that a short part of the head already shows to be too large; 0: it does not. Rounding errs
  // there as it does elsewhere: 0.55 to 1.7 times as much on 32 rows of the first sixteenth as on 32 rows of the whole,
  // for nine of ten heads (606 of gpt8k, SmolLM2 and of seeded generators). A sixteenth of the keys, a sixteenth of the
  // price.
  struct Hopeless {
    double int8 = 0, bfloat16 = 0;
  };
  Hopeless glance() {
    const Copies& copies = engine_.parts.copies;
    const bool ask_int8 = copies.int8 && error_ < kLooseBudget, ask_bfloat16 = copies.bfloat16 && error_ < kLooseBudget;
    const std::int64_t end = head_.q.shape[2] / kGlance, step = std::max<std::int64_t>(1, end / 2 / kTrialRows - 1) | 1;
    const RowSet rows = {.first = end - 1 - step * (kTrialRows - 1), .step = step, .count = kTrialRows};
    std::int64_t keys =
        std::min(head_.k.shape[2] / kGlance, head_.key_lengths != nullptr ? *head_.key_lengths : head_.k.shape[2]);
    if (!(ask_int8 || ask_bfloat16) || rows.first < 0 || keys < kTrialRows) return {};
    const std::int64_t* const lengths = head_.key_lengths;
    const double before = state_.work;
    if (head_.options.causal == 0) head_.key_lengths = &keys;  // a causal row sees few of itself
    run_exactly(rows, scratch_.exact, scratch_.exact_lse);
    const auto ask = [&](std::int32_t precision, double most) {
      run_by(dense_plan(precision), rows, scratch_.tried, scratch_.tried_lse);
      const double error = compare(rows.count);
      if (score_error(rows.count) > 2 * kLargestScoreError * error_) return std::numeric_limits<double>::infinity();
      return error > most * error_ ? error : 0;
    };
    Hopeless found;
    if (ask_int8) found.int8 = ask(ADAATTN_PRECISION_INT8, kHopelessInt8);
    if (ask_bfloat16)
      found.bfloat16 = ask(ADAATTN_PRECISION_BFLOAT16, error_ < kTightBudget ? kHopelesslyTight : kHopelessBFloat16);
    head_.key_lengths = lengths;
    state_.work = before + (state_.work - before) / kGlance;  // rows count as if they saw as much as others
    return found;
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
    if (found.limit > kSurely * error_ && found.value <= kAlone * error_ && error_ >= kTightBudget) {
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
    const auto plan_at = [&](int level) {
      adaattn_head_plan plan = tiled_plan(error_, level, precisions);
      if (!screened) plan.screen = kNever;
      return plan;
    };
    LevelSearch levels;
    if (!screened || state_.tight) levels.high = kFewLevels;
    Choice best = {dense_plan(ADAATTN_PRECISION_FLOAT32), 1};
    const std::int64_t size = kLanes * head_.v.shape[3];
    double norm = 0;
    for (std::int64_t panel = kPilotPanels; panel-- > 0;) {
      run_exactly(pilot_rows(engine_, panel), scratch_.exact + panel * size);
      norm += sums_of(panel * kLanes, kLanes).y;
      if (panel + 1 < kPilotPanels || !state_.tight) continue;
      // The longest panel by the most careful of few plans tells whether any is worth the others.
      run_by(plan_at(levels.high - 1), pilot_rows(engine_, panel), scratch_.tried + panel * size);
      if (std::sqrt(sums_of(panel * kLanes, kLanes).x / norm) > kHopelessPanel * kPilotShare * error_) return best;
    }
    while (!levels.done()) {
      const adaattn_head_plan plan = plan_at(levels.next());
      const auto [error, cost] = try_tiles(plan, norm);
      const bool accepted = accepts_pilot(error);
      if (cost > worthwhile()) {  // more careful ones save less
        if (!accepted) break;     // and looser ones err more
        levels.high = levels.next();
        continue;
      }
      if (accepted) best = {plan, cost};
      levels.record(accepted);
    }
    // A few panels see little of errors that lie in few rows, as those of tight budgets do: then a level is added.
    if (best.plan.form == ADAATTN_TILED && state_.tight) best.plan = plan_at(levels.high + 1);
    // Pooling what a looser screen leaves out may hold the budget for less.
    if (screened && levels.high > 0 && levels.high < kRuleLevels && !state_.tight) {
      adaattn_head_plan plan = plan_at(levels.high - 1);
      plan.pooled = 1;
      const auto [error, cost] = try_tiles(plan, norm);
      if (accepts_pilot(error) && cost < best.cost) best = {plan, cost};
    }
    return best;
  }

  struct Tried {
    ErrorEstimate error;
    double cost;
  };
  // norm: squared, of the panels' exact rows. Panels are tried until their errors alone exceed what may be accepted.
  Tried try_tiles(const adaattn_head_plan& plan, double norm) {
    const std::int64_t size = kLanes * head_.v.shape[3];
    TileCounts counts;
    double squares = 0;
    for (std::int64_t panel = kPilotPanels; panel-- > 0;) {
      counts = add(counts, run_by(plan, pilot_rows(engine_, panel), scratch_.tried + panel * size));
      squares += sums_of(panel * kLanes, kLanes).x;
      const double least = std::sqrt(squares / norm);
      if (least > kPilotShare * error_) return {{least, least}, cost_share(counts, plan, engine_.time_of(index_))};
    }
    return {estimate(kPilotRows), cost_share(counts, plan, engine_.time_of(index_))};
  }

  bool accepts_pilot(const ErrorEstimate& found) const {
    return found.value <= kPilotShare * error_ && accepts(found, kPilotLimit * error_);
  }

  static constexpr std::int64_t kGlance = 16;  // a part of the head
  // Of a budget: errors there from which on a precision is not tried. Of those 606 heads few that have such an error
  // hold the budget: of 53 one in int8 at 3e-2, of 312 none at 1e-2; in bfloat16 of 7 one at 1e-2, of 417 none at 3e-3,
  // of which 0.6 may be used.
  static constexpr double kHopelessInt8 = 1.5, kHopelesslyTight = 1, kHopelessBFloat16 = 2;
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
  static constexpr double kSure = 0.9;           // of it, that the limit may take on twice as many rows
  static constexpr double kPilotShare = 0.65;    // of the budget that pilot panels may use: they are few
  static constexpr double kHopelessPanel = 1.5;  // of that: what one panel tells against a plan
  static constexpr double kPilotLimit = 0.85;    // and that their limit may reach

  int thread_;
  double error_;
};

}  // namespace

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
