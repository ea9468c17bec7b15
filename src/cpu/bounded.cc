// The stages, head by head (what the bounds are: plan/error_bound.h):
//   measure  per key head the means and spreads of v by tiles, and the largest norms
//   plan     a few panels of queries are run exactly: their norm says what error the head may make, and how many of
//            their tiles that would summarise says whether the head is worth it; else it runs densely
//   attend   all blocks of queries; in each panel as many tiles are summarised as its part of the error allows
//   verify   the rows' bounds are summed; a head over budget runs its worst blocks again with nothing summarised. A
//            head whose float32 rounding alone cannot be certified is run in FP64.
#include "cpu/bounded.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/error.h"
#include "common/tensor.h"
#include "cpu/bounded_block.h"
#include "cpu/bounded_engine.h"
#include "cpu/forward.h"
#include "cpu/forward_plan.h"
#include "cpu/head_problem.h"
#include "cpu/threads.h"
#include "cpu/tiled.h"
#include "cpu/value_tiles.h"
#include "plan/error_bound.h"

namespace adaattn::cpu {
namespace bounds {
namespace {

// Fewer leave nothing over once spreads and pilot are paid: 4 % of the work of a head that then runs densely, at 4,096
// tokens. A call that names the kernel wants to see it at work.
constexpr std::int64_t kLeastTokens = 4096, kLeastTokensIfNamed = 1024;
// Multiply-adds that tiles must save, as a share of dense attention's: the pilot, the spreads and the second pass over
// the exponentials cost about 0.07.
constexpr double kLeastSaving = 0.12;

Engine lay_out_engine(const adaattn_forward_args& args, Scratch& scratch) {
  Engine engine{};
  const std::int64_t nq = args.q.shape[2], nk = args.k.shape[2];
  const auto dv = static_cast<std::size_t>(args.v.shape[3]), queries = static_cast<std::size_t>(nq);
  engine.args = &args;
  engine.threads = thread_count(args.options.num_threads);
  engine.heads = args.q.shape[0] * args.q.shape[1];
  engine.tiles_pay = std::min(nq, nk) >= (args.options.kernel != nullptr ? kLeastTokensIfNamed : kLeastTokens);
  if (engine.tiles_pay) {
    engine.block = bounded_block_rows(args);
  } else {
    adaattn_forward_args head = args;  // blocks small enough that few heads keep all threads busy, too
    head.k.shape[1] = head.q.shape[1];
    engine.block = make_forward_plan(head, engine.threads).block;
  }
  engine.blocks = (nq + engine.block - 1) / engine.block;
  const auto heads = static_cast<std::size_t>(engine.heads), blocks = static_cast<std::size_t>(engine.blocks);
  const auto key_heads = static_cast<std::size_t>(args.q.shape[0] * args.k.shape[1]);
  constexpr auto kPilots = static_cast<std::size_t>(kPilotPanels);
  engine.values = scratch.take<ValueTiles>(key_heads);
  engine.states = scratch.take<HeadState>(heads);
  engine.block_states = scratch.take<BlockState>(heads * blocks);
  engine.order = scratch.take<std::int64_t>(blocks);
  engine.pilots = scratch.take<BlockBound>(heads * kPilots);
  engine.pilot_out = scratch.take<float>(engine.tiles_pay ? heads * kPilots * kMaxPanelLanes * dv : 0);
  engine.max_probability = scratch.take<float>(heads * queries);
  engine.out = scratch.take<double>(queries * dv);
  engine.lse = scratch.take<double>(queries);
  engine.scratch = scratch.take<ThreadScratch>(static_cast<std::size_t>(engine.threads));
  for (std::size_t i = 0; i < key_heads; ++i) {
    const ValueTiles values = lay_out_value_tiles(args, scratch);
    if (engine.values != nullptr) engine.values[i] = values;
  }
  for (int t = 0; t < engine.threads; ++t) {
    ThreadScratch mine = {.forward = lay_out(args, scratch),
                          .bounded = {},
                          .values = lay_out_value_tiles_thread(args, scratch),
                          .doubles = lay_out_double_rows(args, scratch)};
    if (engine.tiles_pay) mine.bounded = lay_out_bounded(args, scratch);
    if (engine.scratch != nullptr) engine.scratch[t] = mine;
  }
  return engine;
}

// Runs body and adds its wall time to seconds.
template <class Body>
void timed(double& seconds, Body body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The head's problem with a max_probability in any case: the bound of a dense head needs it.
adaattn_forward_args own_problem(const Engine& engine, std::int64_t head) {
  adaattn_forward_args one = head_problem(*engine.args, head);
  if (one.max_probability == nullptr) one.max_probability = engine.max_probability + head * one.q.shape[2];
  return one;
}

ForwardPlan block_plan(const Engine& engine, const adaattn_forward_args& head) {
  ForwardPlan plan = make_forward_plan(head, 1);
  plan.block = engine.block;
  plan.blocks = plan.tasks = engine.blocks;
  return plan;
}

void measure(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  for_all(engine, args.q.shape[0] * args.k.shape[1], [&](std::int64_t i, const ThreadScratch& scratch) {
    build_value_tiles(args, i / args.k.shape[1], i % args.k.shape[1], engine.tiles_pay, scratch.values,
                      engine.values[i]);
  });
}

// The multiply-adds of the spreads and of some pilot panels for one query head, as a share of dense attention's.
double planning_share(const adaattn_forward_args& args, std::int64_t panels) {
  const auto d = static_cast<double>(args.q.shape[3]), dv = static_cast<double>(args.v.shape[3]);
  const auto nq = static_cast<double>(args.q.shape[2]), tile = static_cast<double>(kBoundTile);
  const double group = static_cast<double>(args.q.shape[1]) / static_cast<double>(args.k.shape[1]);
  const double visible = nq * (args.options.causal != 0 ? 0.5 : 1);
  return tile * (dv + tile) / group / (visible * (d + dv)) + static_cast<double>(panels * kPilotQueries) / nq;
}

// A pilot panel's rows, with nothing written but float32 output.
BlockBound try_panel(const Engine& engine, std::int64_t index, const ThreadScratch& scratch) {
  const std::int64_t head = index / kPilotPanels, panel = index % kPilotPanels;
  adaattn_forward_args args = head_problem(*engine.args, head);
  const std::int64_t nq = args.q.shape[2], dv = args.v.shape[3];
  const std::int64_t first = (2 * panel + 1) * (nq / kPilotQueries) / (2 * kPilotPanels) * kPilotQueries;
  args.q.data = static_cast<std::byte*>(args.q.data) + offset_of(args.q, 0, 0, first, 0) * dtype_size(args.q.dtype);
  args.q.shape[2] = kPilotQueries;
  args.lse = args.entropy = args.max_probability = args.summarised_mass = args.omitted_mass = nullptr;
  args.out = {.data = engine.pilot_out + index * kPilotQueries * dv,
              .dtype = ADAATTN_FLOAT32,
              .device = ADAATTN_CPU,
              .shape = {1, 1, kPilotQueries, dv},
              .stride = {0, 0, dv, 1}};
  ForwardPlan plan = make_forward_plan(args, 1);
  plan.args = &args;
  plan.block = kPilotQueries;
  plan.blocks = plan.tasks = 1;
  plan.query_count = nq;
  plan.first_query = first;
  return try_bounded_block(plan, 0, values_of(engine, head), planned_error(args.options.error), scratch.forward,
                           scratch.bounded);
}

void check_plan(const Engine& engine, std::int64_t head) {
  const adaattn_head_plan* plans = engine.args->plans;
  if (plans != nullptr && plans[head].form == ADAATTN_LOW_RANK)
    refuse("plans[", head,
           "].form is 2 (low rank), which has no bound: must be -1 (automatic), 0 (dense) or 1 (tiled)");
}

void plan_heads(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  const auto asked = [&](std::int64_t h) {
    return args.plans != nullptr ? static_cast<adaattn_form>(args.plans[h].form) : ADAATTN_AUTOMATIC;
  };
  const auto may_be_tiled = [&](std::int64_t h) {
    return engine.tiles_pay && asked(h) != ADAATTN_DENSE && values_of(engine, h).sizes->finite;
  };
  const auto pays = [&](const BlockBound& pilot) { return 1 - tile_work(args, pilot) >= kLeastSaving; };
  // Two panels in the middle say whether the head is worth the other two.
  for (const bool middle : {true, false}) {
    if (!engine.tiles_pay) break;
    for_all(engine, engine.heads * kPilotPanels, [&](std::int64_t i, const ThreadScratch& scratch) {
      const std::int64_t h = i / kPilotPanels, panel = i % kPilotPanels;
      BlockBound* pilots = engine.pilots + h * kPilotPanels;
      if ((panel == 1 || panel == 2) != middle) return;
      const bool wanted = may_be_tiled(h) && (middle || pays(add(pilots[1], pilots[2])));
      pilots[panel] = wanted ? try_panel(engine, i, scratch) : BlockBound{};
    });
  }
  for (std::int64_t h = 0; h < engine.heads; ++h) {
    HeadState& state = engine.states[h];
    state = {};
    state.form = ADAATTN_DENSE;
    for (std::int64_t i = 0; i < engine.blocks; ++i)
      engine.block_states[h * engine.blocks + i] = {.bound = {}, .wanted = true, .summarises = true};
    if (!may_be_tiled(h)) continue;
    const bool tried = engine.pilots[h * kPilotPanels].tiles > 0;  // the panels at the ends, too
    state.work = planning_share(args, tried ? kPilotPanels : kPilotPanels / 2);
    if (!tried) continue;
    BlockBound pilot;
    for (std::int64_t i = 0; i < kPilotPanels; ++i) pilot = add(pilot, engine.pilots[h * kPilotPanels + i]);
    // The panels stand for equal parts of the rows. What they were off by was rounding alone.
    const double error = planned_error(args.options.error) * std::sqrt(pilot.norm) - std::sqrt(pilot.error);
    if (!(error > 0) || pilot.tiles == 0 || !pays(pilot)) continue;
    state.form = ADAATTN_TILED;
    state.allowed = error * error / static_cast<double>(pilot.tiles);
  }
}

// Runs the wanted blocks of all heads.
void attend(const Engine& engine) {
  const std::size_t panel = panel_rows();
  const std::size_t panels = (static_cast<std::size_t>(engine.args->q.shape[2]) + panel - 1) / panel;
  for_all(engine, engine.heads * engine.blocks, [&](std::int64_t i, const ThreadScratch& scratch) {
    const std::int64_t h = i / engine.blocks;
    const HeadState& state = engine.states[h];
    BlockState& block = engine.block_states[i];
    if (!block.wanted) return;
    block.wanted = false;
    const adaattn_forward_args head = own_problem(engine, h);
    const ForwardPlan plan = block_plan(engine, head);
    const std::int64_t task = i % engine.blocks;
    if (state.form == ADAATTN_DENSE) {
      run_forward_task(plan, task, scratch.forward);
      block.bound = bound_dense_block(plan, task, *values_of(engine, h).sizes, scratch.forward);
      return;
    }
    std::uint8_t* classes = engine.args->tile_classes;
    if (classes != nullptr) classes += static_cast<std::size_t>(h) * panels * bound_tiles(*engine.args);
    block.bound = run_bounded_block(plan, task, values_of(engine, h), block.summarises ? state.allowed : 0,
                                    scratch.forward, scratch.bounded, classes);
  });
}

// Wants the blocks with the largest bounds again, exactly, until what the others leave is half of the budget.
void repair(const Engine& engine, std::int64_t head) {
  BlockState* blocks = engine.block_states + head * engine.blocks;
  HeadState& state = engine.states[head];
  double left = state.total.error;
  const double error = planned_error(engine.args->options.error);
  const double target = 0.25 * error * error * state.total.norm;
  for (std::int64_t i = 0; i < engine.blocks; ++i) engine.order[i] = i;
  std::sort(engine.order, engine.order + engine.blocks, [&](std::int64_t a, std::int64_t b) {
    const double at_a = blocks[a].bound.error, at_b = blocks[b].bound.error;
    return at_a != at_b ? at_a > at_b : a < b;
  });
  double again = 0;
  for (std::int64_t i = 0; i < engine.blocks && left > target; ++i) {
    BlockState& block = blocks[engine.order[i]];
    if (!block.summarises) continue;  // running it again changes nothing
    left -= block.bound.error;
    block.summarises = false;
    block.wanted = true;
    again += static_cast<double>(block.bound.tiles);
  }
  state.work += again / static_cast<double>(std::max<std::int64_t>(state.total.tiles, 1));
}

// The head in FP64, for heads that float32 cannot vouch for.
void run_in_fp64(const Engine& engine, std::int64_t head) {
  const adaattn_forward_args one = head_problem(*engine.args, head);
  for_all(engine, (one.q.shape[2] + kDoubleRows - 1) / kDoubleRows,
          [&](std::int64_t task, const ThreadScratch& scratch) {
            run_double_rows(one, task * kDoubleRows, scratch.doubles, engine.out, engine.lse);
          });
  const KeySizes& sizes = *values_of(engine, head).sizes;
  const double scale =
      one.options.has_scale != 0 ? one.options.scale : 1 / std::sqrt(static_cast<double>(one.q.shape[3]));
  const std::int64_t dv = one.v.shape[3];
  HeadState& state = engine.states[head];
  state.total = {};
  for (std::int64_t row = 0; row < one.q.shape[2]; ++row) {
    double query = 0, norm = 0;
    for (std::int64_t c = 0; c < one.q.shape[3]; ++c) query += std::pow(load(one.q, 0, 0, row, c), 2.0);
    for (std::int64_t c = 0; c < dv; ++c) {
      const double value = engine.out[row * dv + c];
      store_element(one.out.data, offset_of(one.out, 0, 0, row, c), one.out.dtype, static_cast<float>(value));
      norm += value * value;
    }
    if (one.lse != nullptr) one.lse[row] = static_cast<float>(engine.lse[row]);
    const double error =
        rounding_bound(std::fabs(scale) * std::sqrt(query) * sizes.key, 1, sizes.value,
                       static_cast<double>(one.q.shape[3]), static_cast<double>(one.k.shape[2]), kFloat64Unit) +
        kFloat32Unit * std::sqrt(norm);  // of the result
    state.total.error += error * error;
    state.total.norm += norm;
  }
  state.form = ADAATTN_DENSE;
  state.bound = relative_bound(std::sqrt(state.total.error), std::sqrt(state.total.norm));
  state.done = true;
  state.work += 1;
}

void verify(const Engine& engine) {
  for (std::int64_t h = 0; h < engine.heads; ++h) {
    HeadState& state = engine.states[h];
    if (state.done) continue;
    const BlockState* blocks = engine.block_states + h * engine.blocks;
    state.total = {};
    bool summarises = false;
    for (std::int64_t i = 0; i < engine.blocks; ++i) {
      state.total = add(state.total, blocks[i].bound);
      summarises = summarises || blocks[i].summarises;
    }
    state.bound = relative_bound(std::sqrt(state.total.error), std::sqrt(state.total.norm));
    const bool finite = values_of(engine, h).sizes->finite && !std::isnan(state.total.error + state.total.norm);
    state.done = state.bound <= engine.args->options.error;
    if (state.done) continue;
    ++state.escalations;
    if (state.form == ADAATTN_TILED && finite && summarises) {
      repair(engine, h);
    } else if (state.form == ADAATTN_TILED && !finite) {  // a query with NaN or overflow: as SDPA
      state.form = ADAATTN_DENSE;
      for (std::int64_t i = 0; i < engine.blocks; ++i) engine.block_states[h * engine.blocks + i].wanted = true;
    } else if (finite) {
      run_in_fp64(engine, h);
    } else {
      --state.escalations;
      state.bound = std::numeric_limits<double>::infinity();
      state.done = true;
    }
  }
}

std::size_t workspace(const adaattn_forward_args& args) {
  Scratch scratch(nullptr);
  lay_out_engine(args, scratch);
  return scratch.bytes();
}

void run(const adaattn_forward_args& args) {
  Scratch scratch(args.workspace);
  const Engine engine = lay_out_engine(args, scratch);
  for (std::int64_t h = 0; h < engine.heads; ++h) check_plan(engine, h);
  adaattn_stage_times times{};
  timed(times.measure, [&] { measure(engine); });
  timed(times.plan, [&] { plan_heads(engine); });
  const auto undecided = [&] {
    return std::any_of(engine.states, engine.states + engine.heads, [](const HeadState& s) { return !s.done; });
  };
  while (undecided()) {
    timed(times.attend, [&] { attend(engine); });
    timed(times.verify, [&] { verify(engine); });
  }
  if (args.times != nullptr) *args.times = times;
  report(engine);
}

}  // namespace
}  // namespace bounds

std::size_t bounded_workspace(const adaattn_forward_args& args) { return bounds::workspace(args); }

void bounded(const adaattn_forward_args& args) { bounds::run(args); }

}  // namespace adaattn::cpu
