#include "cpu/pilot.h"

#include <algorithm>
#include <limits>

#include "cpu/droppable.h"
#include "cpu/fill_key_heads.h"
#include "cpu/precision_trials.h"
#include "cpu/probes.h"
#include "plan/ladder.h"

namespace adaattn::cpu {
namespace {

// One head while it is planned.
class Pilot : private PrecisionTrials {
 public:
  Pilot(const Engine& engine, std::int64_t index, int thread)
      : PrecisionTrials(engine, index, thread), thread_(thread) {}

  // The caller's plan, or what a glance tells of the precisions.
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
              .sampled = false,
              .tight = error_ < kTightBudget,
              .reads = {},
              .reads_tiles = false,
              .looks = {},
              .may_be_tiled = false,
              .precisions = {},
              .best = 1 - kLeastGain};
    if (!is_finite()) return;
    if (is_given()) return take(engine_.args->plans[engine_.head(index_)]);
    const Copies& copies = engine_.parts.copies;
    state_.looks = glance();
    state_.reads = {.int8 = copies.int8 && state_.looks.int8 == 0,
                    .bfloat16 = copies.bfloat16 && state_.looks.bfloat16 == 0};
  }

  // Unless the plan is the caller's, a dense one in the cheapest precision. What the head reads is there.
  void choose() {
    if (!is_finite()) state_.plan = dense_plan(ADAATTN_PRECISION_FLOAT32);
    if (is_finite() && !is_given()) choose_precisions();
  }

  // Whether a screen may pay. At tight budgets it seldom does: then only where a late panel could do without more than
  // twice the tiles that it would have to leave out. (Of 19 heads of SmolLM2 that could do without 0.5 to 0.6 of them
  // none was tiled, of 15 with 0.6 to 0.7 two, of 47 with more 23.)
  bool wants_screen() {
    if (!is_finite()) return false;
    if (is_screened(state_.plan)) return true;
    if (!state_.may_be_tiled || !state_.tight) return state_.may_be_tiled;
    const std::int64_t head = engine_.head(index_), heads = engine_.args->q.shape[1];
    state_.work += share(kLanes) / 6;  // a third of a panel's scores
    return droppable_share(*engine_.args, head / heads, head % heads, tiled_plan(error_, 0, state_.precisions).screen,
                           scratch_.key_head) >= kLeastTightlyDroppable;
  }

  // Before a search for its tiles.
  void expect_tiles() {
    if (!state_.may_be_tiled) return;
    const Copies more = copies_of(tiled_plan(error_, 0, state_.precisions));
    state_.reads = {.int8 = state_.reads.int8 || more.int8, .bfloat16 = state_.reads.bfloat16 || more.bfloat16};
    state_.reads_tiles = true;
  }

  // A tiled plan if one costs less, and the exact probe rows.
  void finish() {
    if (!is_finite()) state_.plan = dense_plan(ADAATTN_PRECISION_FLOAT32);
    if (state_.may_be_tiled && is_finite()) choose_tiles();
    if (!is_dense_float32(state_.plan)) run_probes(engine_, index_, thread_);
  }

 private:
  struct Choice {
    adaattn_head_plan plan;
    double cost;
  };

  bool is_finite() const { return *engine_.keys_of(index_).finite; }
  bool is_given() const {
    return engine_.args->plans != nullptr && engine_.args->plans[engine_.head(index_)].form != ADAATTN_AUTOMATIC;
  }

  void take(const adaattn_head_plan& plan) {
    // Thresholds are of tiled heads: a policy leaves them in place when it has a head run dense.
    state_.plan = plan.form == ADAATTN_DENSE ? dense_plan(plan.precision) : plan;
    if (plan.form != ADAATTN_LOW_RANK) {
      state_.reads = copies_of(state_.plan);
      state_.reads_tiles = !is_dense_float32(state_.plan);
      return;
    }
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
    const RowSet rows = trial_rows(engine_, 0);
    const bool try_int8 = state_.reads.int8, try_bfloat16 = state_.reads.bfloat16;
    if (copies.int8 && !try_int8) int8 = state_.looks.int8;
    if (copies.bfloat16 && !try_bfloat16) bfloat16 = state_.looks.bfloat16;
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
    // Where the dense plan's error is all that trials of tiles may show, none of them holds.
    const double floor = int8 <= kAlone * error_ ? int8 : bfloat16;
    state_.may_be_tiled = engine_.long_enough() && (state_.tight || floor < kRoomForTiles * error_);
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

  // Whether the loosest screen leaves out enough for a look, and costs little enough: else a head is settled at the
  // price of the screen.
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
    const double most = (state_.tight ? 1 : kLoosest) * worthwhile();
    return dropped >= (state_.tight ? kLeastTightlyDropped : kLeastDropped) &&
           cost_share(counts, plan, engine_.time_of(index_)) < most;
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
    double refused = std::numeric_limits<double>::infinity();
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
      if (!accepted && error.value > kHardlyLess * refused) break;  // what is left is not the tiles'
      if (!accepted) refused = error.value;
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

  static constexpr std::int64_t kLeastUnscreened = 8192;  // keys
  static constexpr double kBuildTime = 3;  // of a multiply-add of a coreset's building, over one of attention's
  static constexpr int kFewLevels = 3;     // that are tried where little is to be gained
  static constexpr double kLeastDropped = 0.05, kLeastTightlyDroppable = 0.6;
  // Searches that the cost of the loosest screen, over what a plan may cost, says little of: of 391 heads (gpt8k,
  // SmolLM2 and seeded generators at 1e-1, 3e-2 and 1e-2) where that was above 1.1, 4 were tiled.
  static constexpr double kLoosest = 1.1;
  // Of a budget that the dense plan's error may take if tiles are to be told apart: of 35 searched heads of SmolLM2
  // with 0.65 or more none was tiled, of 25 with 0.6 to 0.65 five, which saved less than the searches took.
  static constexpr double kRoomForTiles = 0.6;
  static constexpr double kHardlyLess = 0.97;
  static constexpr double kPilotShare = 0.65;    // of the budget that pilot panels may use: they are few
  static constexpr double kHopelessPanel = 1.5;  // of that: what one panel tells against a plan
  static constexpr double kPilotLimit = 0.85;    // and that their limit may reach

  int thread_;
};

// Only heads whose basis holds enough have their tiles, and the screen's, filled.
void build_screens(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  const std::int64_t key_heads = engine.wave_heads / engine.group;
  const float least_energy = args.plans != nullptr ? 0 : kLeastEnergy;
  for_all(engine, key_heads, [&](std::int64_t i, int thread) {
    KeyHead& keys = engine.keys[i];
    const std::int64_t first = i * engine.group, end = first + engine.group, key_head = engine.first + i;
    keys.screened = false;
    for (std::int64_t h = first; h < end && !keys.screened; ++h)
      keys.screened = Pilot(engine, h, thread).wants_screen();
    if (!keys.screened) return;
    find_screen(args, key_head / args.k.shape[1], key_head % args.k.shape[1], engine.scratch[thread].key_head, keys);
    keys.screened = !(*keys.energy < least_energy);
    for (std::int64_t h = first; h < end && keys.screened; ++h) Pilot(engine, h, thread).expect_tiles();
  });
  fill_key_heads(engine);
  for (std::int64_t i = 0; i < key_heads; ++i)
    engine.keys[i].screened = engine.keys[i].screened && *engine.keys[i].finite;
  if (std::none_of(engine.keys, engine.keys + key_heads, [](const KeyHead& keys) { return keys.screened; })) return;
  for_key_spans(engine, [&](std::int64_t i, std::int64_t b, std::int64_t key_head, KeySpan span, int thread) {
    if (engine.keys[i].screened) fill_screen(args, b, key_head, span, engine.scratch[thread].key_head, engine.keys[i]);
  });
}

}  // namespace

void plan_heads(const Engine& engine) {
  for_all(engine, engine.wave_heads, [&](std::int64_t i, int thread) { Pilot(engine, i, thread).begin(); });
  fill_key_heads(engine);
  for_all(engine, engine.wave_heads, [&](std::int64_t i, int thread) { Pilot(engine, i, thread).choose(); });
  if (engine.parts.screen) build_screens(engine);
  for_all(engine, engine.wave_heads, [&](std::int64_t i, int thread) { Pilot(engine, i, thread).finish(); });
}

}  // namespace adaattn::cpu
