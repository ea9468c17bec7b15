// The stages, head by head:
//   measure  the screen's basis, the screened keys and the tiles' mean values, per key head
//   plan     a few panels of queries are run exactly and by the budget's rules: the first rule whose error there is
//            accepted and that saves enough work is the head's; dense if there is none
//   attend   all panels by that rule
//   verify   evenly spaced rows are run exactly; a head whose error there is not accepted takes the next rule, at last
//            dense
#include "cpu/adaptive.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "common/tensor.h"
#include "cpu/forward.h"
#include "cpu/forward_plan.h"
#include "cpu/screen.h"
#include "cpu/threads.h"
#include "cpu/tiled.h"
#include "plan/tile_rule.h"

namespace adaattn::cpu {
namespace {

constexpr std::int64_t kPilotPanels = 4;  // panels of consecutive queries that a rule is tried on
constexpr int kDense = kRuleLevels;       // the level past the last rule

struct HeadState {
  int level;
  LevelSearch search;
  int worthless;    // the first level that saves too little
  bool decided;     // pilot: the level is chosen; verify: the head is done
  double estimate;  // of the relative error; 0 for dense heads
  TileCounts counts;
  double work;  // share of dense attention's multiply-adds so far
  int escalations;
  std::array<double, 2> sums;  // squared error and squared norm over pilot or probe rows
};

struct ThreadScratch {
  ForwardScratch forward;
  TiledScratch tiled;
  ScreenScratch screen;
};

// Everything in the workspace.
struct Engine {
  const adaattn_forward_args* args;
  int threads;
  std::int64_t heads;       // B * Hq
  std::int64_t probe_rows;  // per head
  Screen* screens;          // [B * Hk]
  HeadState* states;        // [heads]
  float* exact;             // [heads][max(pilot, probe) rows][Dv]
  float* tried;             // [heads][pilot rows][Dv]
  ThreadScratch* scratch;   // [threads]
};

constexpr auto kLanes = static_cast<std::int64_t>(kMaxPanelLanes);
constexpr std::int64_t kPilotRows = kPilotPanels * kLanes;

Engine lay_out_engine(const adaattn_forward_args& args, Scratch& scratch) {
  Engine engine{};
  engine.args = &args;
  engine.threads = thread_count(args.options.num_threads);
  engine.heads = args.q.shape[0] * args.q.shape[1];
  engine.probe_rows = std::min<std::int64_t>(kProbeRows, args.q.shape[2]);
  const auto key_heads = static_cast<std::size_t>(args.q.shape[0] * args.k.shape[1]);
  const auto heads = static_cast<std::size_t>(engine.heads), dv = static_cast<std::size_t>(args.v.shape[3]);
  engine.screens = scratch.take<Screen>(key_heads);
  engine.states = scratch.take<HeadState>(heads);
  engine.exact = scratch.take<float>(heads * std::max<std::size_t>(kPilotRows, kProbeRows) * dv);
  engine.tried = scratch.take<float>(heads * kPilotRows * dv);
  engine.scratch = scratch.take<ThreadScratch>(static_cast<std::size_t>(engine.threads));
  for (std::size_t i = 0; i < key_heads; ++i) {
    const Screen screen = lay_out_screen(args, scratch);
    if (engine.screens != nullptr) engine.screens[i] = screen;
  }
  for (int t = 0; t < engine.threads; ++t) {
    const ThreadScratch mine = {.forward = lay_out(args, scratch),
                                .tiled = lay_out_tiled(args, scratch),
                                .screen = lay_out_screen_thread(args, scratch)};
    if (engine.scratch != nullptr) engine.scratch[t] = mine;
  }
  return engine;
}

// body(index, scratch of the thread) for all indices, in any order.
template <class Body>
void for_all(const Engine& engine, std::int64_t count, Body body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(engine.threads)
  for (std::int64_t index = 0; index < count; ++index) body(index, engine.scratch[omp_get_thread_num()]);
}

void select(adaattn_tensor& t, std::int64_t b, std::int64_t h) {
  t.data = static_cast<std::byte*>(t.data) + offset_of(t, b, h, 0, 0) * dtype_size(t.dtype);
  t.shape[0] = t.shape[1] = 1;
}

// The problem of one query head alone.
adaattn_forward_args head_problem(const adaattn_forward_args& args, std::int64_t head) {
  const std::int64_t b = head / args.q.shape[1], h = head % args.q.shape[1];
  const std::int64_t key_head = h / (args.q.shape[1] / args.k.shape[1]), row = head * args.q.shape[2];
  adaattn_forward_args one = args;
  select(one.q, b, h);
  select(one.k, b, key_head);
  select(one.v, b, key_head);
  select(one.out, b, h);
  if (args.lse != nullptr) one.lse = args.lse + row;
  if (args.entropy != nullptr) one.entropy = args.entropy + row;
  if (args.max_probability != nullptr) one.max_probability = args.max_probability + row;
  if (args.key_lengths != nullptr) one.key_lengths = args.key_lengths + b;
  return one;
}

const Screen& screen_of(const Engine& engine, std::int64_t head) {
  const adaattn_forward_args& args = *engine.args;
  const std::int64_t b = head / args.q.shape[1], h = head % args.q.shape[1];
  return engine.screens[b * args.k.shape[1] + h / (args.q.shape[1] / args.k.shape[1])];
}

// count rows from first on, step apart, with the output as float32 in out [count][Dv] and no other results.
struct RowsProblem {
  adaattn_forward_args args;
  ForwardPlan plan;

  RowsProblem(const adaattn_forward_args& head, std::int64_t first, std::int64_t step, std::int64_t count, float* out)
      : args(head) {
    args.q.data = static_cast<std::byte*>(args.q.data) + offset_of(args.q, 0, 0, first, 0) * dtype_size(args.q.dtype);
    args.q.shape[2] = count;
    args.q.stride[2] *= step;
    const std::int64_t dv = args.v.shape[3];
    args.out = {.data = out,
                .dtype = ADAATTN_FLOAT32,
                .device = ADAATTN_CPU,
                .shape = {1, 1, count, dv},
                .stride = {0, 0, dv, 1}};
    args.lse = args.entropy = args.max_probability = nullptr;
    plan = make_forward_plan(args, 1);
    plan.args = &args;
    plan.query_count = head.q.shape[2];
    plan.first_query = first;
    plan.query_step = step;
  }
  RowsProblem(const RowsProblem&) = delete;
  RowsProblem& operator=(const RowsProblem&) = delete;
};

// Squared error of from against exact, and squared norm of exact.
std::array<double, 2> compare(const float* from, const float* exact, std::size_t count) {
  std::array<double, 2> sums{};
  for (std::size_t i = 0; i < count; ++i) {
    const double difference = static_cast<double>(from[i]) - exact[i];
    sums[0] += difference * difference;
    sums[1] += static_cast<double>(exact[i]) * exact[i];
  }
  return sums;
}

double relative(const std::array<double, 2>& sums) { return sums[0] == 0 ? 0 : std::sqrt(sums[0] / sums[1]); }

// First row of a pilot panel: panels in the middle of equal parts of the sequence.
std::int64_t pilot_row(const Engine& engine, std::int64_t panel) {
  const std::int64_t panels = engine.args->q.shape[2] / kLanes;
  return (2 * panel + 1) * panels / (2 * kPilotPanels) * kLanes;
}

void measure(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  for_all(engine, args.q.shape[0] * args.k.shape[1], [&](std::int64_t i, const ThreadScratch& scratch) {
    build_screen(args, i / args.k.shape[1], i % args.k.shape[1], scratch.screen, engine.screens[i]);
  });
}

// The screen's multiply-adds for one query head, as a share of dense attention's: the sampled Gram matrices and the
// projection of the keys.
double measure_share(const adaattn_forward_args& args) {
  const auto d = static_cast<double>(args.q.shape[3]), nk = static_cast<double>(args.k.shape[2]);
  constexpr double kRank = kScreenRank;
  const double group = static_cast<double>(args.q.shape[1]) / static_cast<double>(args.k.shape[1]);
  const double sampled = std::min(nk, static_cast<double>(2 * kGramRows)) * d * d;
  const double visible = static_cast<double>(args.q.shape[2]) * nk * (args.options.causal != 0 ? 0.5 : 1);
  return (sampled * (1 + 1 / group) + nk * d * kRank / group) / (2 * d * visible);
}

// Runs body(head problem, pilot panel's index, its state, scratch) on the pilot panels of every undecided head.
template <class Body>
void for_pilots(const Engine& engine, Body body) {
  for_all(engine, engine.heads * kPilotPanels, [&](std::int64_t i, const ThreadScratch& scratch) {
    HeadState& state = engine.states[i / kPilotPanels];
    if (!state.decided) body(head_problem(*engine.args, i / kPilotPanels), i, state, scratch);
  });
}

void plan_heads(const Engine& engine) {
  const double error = engine.args->options.error;
  const auto panel_size = static_cast<std::size_t>(kLanes * engine.args->v.shape[3]);
  const double rank_share = static_cast<double>(kScreenRank) / static_cast<double>(engine.args->q.shape[3]);
  const double pilot_share = static_cast<double>(kPilotRows) / static_cast<double>(engine.args->q.shape[2]);
  const auto at = [&](std::int64_t i) { return static_cast<std::size_t>(i) * panel_size; };

  for (std::int64_t h = 0; h < engine.heads; ++h)
    engine.states[h] = {.level = kDense,
                        .search = {},
                        .worthless = kDense,
                        .decided = !*screen_of(engine, h).finite,
                        .estimate = 0,
                        .counts = {},
                        .work = 0,
                        .escalations = 0,
                        .sums = {}};
  // Heads whose screen leaves out next to nothing are settled at the price of the screen.
  for_pilots(engine,
             [&](const adaattn_forward_args& head, std::int64_t i, HeadState& state, const ThreadScratch& scratch) {
               const RowsProblem rows(head, pilot_row(engine, i % kPilotPanels), 1, kLanes, engine.tried + at(i));
               TileCounts counts;
               run_screen_task(rows.plan, 0, screen_of(engine, i / kPilotPanels), rule_for_budget(error, 0),
                               scratch.forward, scratch.tiled, counts);
#pragma omp critical(adaattn_pilot)
               state.counts = add(state.counts, counts);
             });
  for (std::int64_t h = 0; h < engine.heads; ++h) {
    HeadState& state = engine.states[h];
    const TileCounts counts = std::exchange(state.counts, {});
    state.work = measure_share(*engine.args) + pilot_share * rank_share / 2;
    if (!state.decided) state.work += pilot_share;
    if (static_cast<double>(counts.left_out) < kLeastLeftOut * static_cast<double>(counts.visible))
      state.decided = true;
  }
  for_pilots(engine, [&](const adaattn_forward_args& head, std::int64_t i, HeadState&, const ThreadScratch& scratch) {
    const RowsProblem rows(head, pilot_row(engine, i % kPilotPanels), 1, kLanes, engine.exact + at(i));
    run_forward_task(rows.plan, 0, scratch.forward);
  });
  const auto undecided = [](const HeadState& state) { return !state.decided; };
  while (std::any_of(engine.states, engine.states + engine.heads, undecided)) {
    for_pilots(engine,
               [&](const adaattn_forward_args& head, std::int64_t i, HeadState& state, const ThreadScratch& scratch) {
                 const RowsProblem rows(head, pilot_row(engine, i % kPilotPanels), 1, kLanes, engine.tried + at(i));
                 TileCounts counts;
                 run_tiled_task(rows.plan, 0, screen_of(engine, i / kPilotPanels),
                                rule_for_budget(error, state.search.next()), scratch.forward, scratch.tiled, counts);
                 const auto sums = compare(engine.tried + at(i), engine.exact + at(i), panel_size);
#pragma omp critical(adaattn_pilot)
                 {
                   state.counts = add(state.counts, counts);
                   state.sums = {state.sums[0] + sums[0], state.sums[1] + sums[1]};
                 }
               });
    for (std::int64_t h = 0; h < engine.heads; ++h) {
      HeadState& state = engine.states[h];
      if (state.decided) continue;
      state.work += pilot_share * work_share(state.counts, rank_share);
      // A rule that saves too little is as good as dense, and more careful ones save less.
      if (work_share(state.counts, rank_share) > 1 - kLeastGain)
        state.worthless = state.search.high = state.search.next();
      else
        state.search.record(accepts(relative(state.sums), error));
      state.decided = state.search.done();
      if (state.decided) state.level = state.search.high == state.worthless ? kDense : state.search.high;
      state.counts = {};
      state.sums = {};
    }
  }
}

void attend(const Engine& engine) {
  // Blocks of all heads are one list, so that few heads keep all threads busy, too.
  const adaattn_forward_args first = head_problem(*engine.args, 0);
  const std::int64_t blocks = make_forward_plan(first, engine.threads).blocks;
  const std::int64_t block = make_forward_plan(first, engine.threads).block;
  for_all(engine, engine.heads * blocks, [&](std::int64_t i, const ThreadScratch& scratch) {
    HeadState& state = engine.states[i / blocks];
    if (state.decided) return;
    const adaattn_forward_args head = head_problem(*engine.args, i / blocks);
    ForwardPlan plan = make_forward_plan(head, 1);
    plan.block = block;
    plan.blocks = blocks;
    if (state.level == kDense) return run_forward_task(plan, i % blocks, scratch.forward);
    TileCounts counts;
    run_tiled_task(plan, i % blocks, screen_of(engine, i / blocks),
                   rule_for_budget(engine.args->options.error, state.level), scratch.forward, scratch.tiled, counts);
#pragma omp critical(adaattn_attend)
    state.counts = add(state.counts, counts);
  });
}

// Relative error of a head over its probe rows, less what rounding to the output's dtype put there.
double probe_error(const Engine& engine, const adaattn_forward_args& head, const float* exact, std::int64_t first,
                   std::int64_t step) {
  std::array<double, 2> sums{};
  double rounding = 0;
  const std::int64_t dv = head.v.shape[3];
  for (std::int64_t i = 0; i < engine.probe_rows; ++i)
    for (std::int64_t c = 0; c < dv; ++c) {
      const float truth = exact[i * dv + c], got = load(head.out, 0, 0, first + i * step, c);
      float rounded = 0;
      store_element(&rounded, 0, head.out.dtype, truth);
      rounded = load_element(&rounded, 0, head.out.dtype);
      sums[0] += (static_cast<double>(got) - truth) * (static_cast<double>(got) - truth);
      sums[1] += static_cast<double>(truth) * truth;
      rounding += (static_cast<double>(rounded) - truth) * (static_cast<double>(rounded) - truth);
    }
  sums[0] = std::isnan(sums[0]) ? sums[0] : std::max(0.0, sums[0] - rounding);
  return relative(sums);
}

void verify(const Engine& engine, bool first_time) {
  const adaattn_forward_args& args = *engine.args;
  const std::int64_t step = args.q.shape[2] / engine.probe_rows, first = step / 2;
  for_all(engine, engine.heads, [&](std::int64_t h, const ThreadScratch& scratch) {
    HeadState& state = engine.states[h];
    if (state.decided) return;
    const double rank_share = static_cast<double>(kScreenRank) / static_cast<double>(args.q.shape[3]);
    state.work += state.level == kDense ? 1 : work_share(state.counts, rank_share);
    if (state.level == kDense) {
      state.decided = true;
      state.estimate = 0;
      state.counts = {};
      return;
    }
    const adaattn_forward_args head = head_problem(args, h);
    float* exact = engine.exact + static_cast<std::size_t>(h * kProbeRows * args.v.shape[3]);
    if (first_time) {
      const RowsProblem rows(head, first, step, engine.probe_rows, exact);
      for (std::int64_t task = 0; task < rows.plan.tasks; ++task) run_forward_task(rows.plan, task, scratch.forward);
      state.work += static_cast<double>(engine.probe_rows) / static_cast<double>(args.q.shape[2]);
    }
    state.estimate = probe_error(engine, head, exact, first, step);
    state.decided = accepts(state.estimate, args.options.error);
    if (state.decided) return;
    ++state.escalations;
    state.level = state.level + 1 < state.worthless ? state.level + 1 : kDense;
  });
}

}  // namespace

std::size_t adaptive_workspace(const adaattn_forward_args& args) {
  Scratch scratch(nullptr);
  lay_out_engine(args, scratch);
  return scratch.bytes();
}

void adaptive(const adaattn_forward_args& args) {
  Scratch scratch(args.workspace);
  const Engine engine = lay_out_engine(args, scratch);
  measure(engine);
  plan_heads(engine);
  for (std::int64_t h = 0; h < engine.heads; ++h) engine.states[h].decided = false;
  const auto undecided = [&] {
    return std::any_of(engine.states, engine.states + engine.heads, [](const HeadState& s) { return !s.decided; });
  };
  for (bool first_time = true; undecided(); first_time = false) {
    for (std::int64_t h = 0; h < engine.heads; ++h)
      if (!engine.states[h].decided) engine.states[h].counts = {};
    attend(engine);
    verify(engine, first_time);
  }
  if (args.heads == nullptr) return;
  for (std::int64_t h = 0; h < engine.heads; ++h) {
    const HeadState& state = engine.states[h];
    adaattn_head_report& report = args.heads[h];
    report.plan.form = state.level == kDense ? ADAATTN_DENSE : ADAATTN_TILED;
    report.escalations = state.escalations;
    report.estimated_error = state.estimate;
    report.work = state.work;
    report.tiles = state.counts.visible;
    report.high_tiles = state.counts.high;
    report.summarised_tiles = state.counts.summarised;
    report.dropped_tiles = state.counts.left_out;
  }
}

}  // namespace adaattn::cpu
