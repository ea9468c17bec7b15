// The stages, by waves of key heads:
//   measure  what a key head's queries share: its keys' mean, and the first of its tiles in low precision
//   plan     a plan for each head (cpu/pilot.h), unless the caller gave one, and what plans read of their key head: the
//            means of tiles, copies in low precision, the screen
//   attend   all panels by the plans
//   verify   evenly spaced rows, run exactly, tell each head's error; a head whose error is not accepted takes a more
//            careful plan, at last float32 and dense
#include "cpu/adaptive.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/engine.h"
#include "cpu/forward.h"
#include "cpu/pilot.h"
#include "cpu/probes.h"
#include "cpu/tile_costs.h"
#include "cpu/trial_rows.h"
#include "plan/ladder.h"

namespace adaattn::cpu {
namespace {

// What plans of these budgets and sizes can use. 16 and 8 bit are no use below what rounding to them takes: about 2^-9
// of a bfloat16's value, 1e-2 in int8.
Parts wanted_parts(const adaattn_forward_args& args) {
  const double error = args.options.error;
  const Copies paying = paying_copies();
  const bool tiles = std::min(args.q.shape[2], args.k.shape[2]) >= kLeastTiled;
  Parts parts = {.screen = tiles,
                 .int8_screen = paying.int8,
                 .copies = {.int8 = paying.int8 && error >= 4e-3, .bfloat16 = paying.bfloat16 && error >= 0x1p-9}};
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1];
  const auto automatic = [](const adaattn_head_plan& plan) { return plan.form == ADAATTN_AUTOMATIC; };
  if (args.plans != nullptr && std::none_of(args.plans, args.plans + heads, automatic)) parts = {};
  for (std::int64_t h = 0; args.plans != nullptr && h < heads; ++h) {
    const adaattn_head_plan& plan = args.plans[h];
    if (automatic(plan)) continue;
    const Copies read = copies_of(plan);
    parts.copies.int8 = parts.copies.int8 || read.int8;
    parts.copies.bfloat16 = parts.copies.bfloat16 || read.bfloat16;
    parts.int8_screen = paying.int8;
    parts.screen = parts.screen || is_screened(plan);
  }
  return parts;
}

// Keys that the coreset of a low-rank head may have. Coresets see every key: no causal mask. They are no part of the
// gradient, for which classes of tiles are asked.
std::size_t coreset_keys(const adaattn_forward_args& args) {
  if (args.options.causal != 0) return 0;
  const std::int64_t keys = args.k.shape[2];
  std::int64_t most = 0;
  if (args.tile_classes == nullptr && args.options.error >= kLeastLowRankError && keys >= kLeastLowRankKeys)
    most = keys / kLeastLowRankGain;
  for (std::int64_t h = 0; args.plans != nullptr && h < args.q.shape[0] * args.q.shape[1]; ++h)
    if (args.plans[h].form == ADAATTN_LOW_RANK) most = std::max<std::int64_t>(most, args.plans[h].rank);
  return static_cast<std::size_t>(std::min(most, keys));
}

Engine lay_out_engine(const adaattn_forward_args& args, Scratch& scratch) {
  Engine engine{};
  engine.args = &args;
  engine.threads = thread_count(args.options.num_threads);
  engine.parts = wanted_parts(args);
  engine.group = args.q.shape[1] / args.k.shape[1];
  engine.key_heads = args.q.shape[0] * args.k.shape[1];
  // Waves of one size: a small last one leaves threads idle.
  const std::int64_t waves = std::max<std::int64_t>(1, (engine.key_heads - 1) / (2 * engine.threads) + 1);
  engine.wave = (engine.key_heads + waves - 1) / waves;
  const auto heads = static_cast<std::size_t>(engine.wave * engine.group),
             dv = static_cast<std::size_t>(args.v.shape[3]), threads = static_cast<std::size_t>(engine.threads);
  engine.keys = scratch.take<KeyHead>(static_cast<std::size_t>(engine.wave));
  engine.states = scratch.take<HeadState>(heads);
  engine.coreset_keys = coreset_keys(args);
  if (engine.coreset_keys > 0) engine.coresets = scratch.take<Coreset>(heads);
  for (std::size_t i = 0; engine.coreset_keys > 0 && i < heads; ++i) {
    const Coreset coreset = lay_out_coreset(args, engine.coreset_keys, scratch);
    if (engine.coresets != nullptr) engine.coresets[i] = coreset;
  }
  const std::int64_t blocks = row_blocks(args, engine.threads);
  if (asks_for_masses(args)) engine.accounts = scratch.take<Account>(heads * static_cast<std::size_t>(blocks));
  engine.probes = scratch.take<float>(heads * kProbeSets * kProbeRows * dv);
  engine.scratch = scratch.take<ThreadScratch>(threads);
  for (std::int64_t i = 0; i < engine.wave; ++i) {
    const KeyHead keys = lay_out_key_head(args, engine.parts, scratch);
    if (engine.keys != nullptr) engine.keys[i] = keys;
  }
  for (int t = 0; t < engine.threads; ++t) {
    const ThreadScratch mine = {.forward = lay_out(args, scratch),
                                .tiled = lay_out_tiled(args, scratch),
                                .key_head = lay_out_key_head_thread(args, scratch),
                                .coreset = engine.coreset_keys > 0
                                               ? lay_out_coreset_thread(args, engine.coreset_keys, scratch)
                                               : CoresetScratch{},
                                .exact = scratch.take<float>(kPilotRows * dv),
                                .tried = scratch.take<float>(kPilotRows * dv),
                                .exact_lse = scratch.take<float>(kTrialRows),
                                .tried_lse = scratch.take<float>(kTrialRows)};
    if (engine.scratch != nullptr) engine.scratch[t] = mine;
  }
  return engine;
}

void measure(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  for_all(engine, engine.wave_heads / engine.group, [&](std::int64_t i, int thread) {
    const std::int64_t key_head = engine.first + i;
    begin_key_head(args, key_head / args.k.shape[1], key_head % args.k.shape[1], keys_at_a_glance(args),
                   engine.scratch[thread].key_head, engine.keys[i]);
  });
}

// Statistics of the softmax are not to be had from a coreset: they come out as NaN.
void attend_low_rank(const Engine& engine, std::int64_t index, const adaattn_forward_args& head, std::int64_t first,
                     std::int64_t count, const ThreadScratch& scratch) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (head.entropy != nullptr) std::fill_n(head.entropy + first, count, nan);
  for (float* statistic : {head.max_probability, head.summarised_mass, head.omitted_mass})
    if (statistic != nullptr) std::fill_n(statistic + first, count, nan);
  const std::int64_t failed =
      attend_coreset(rows_of(head.q, 0, 0, first), count, make_forward_plan(head, 1).scale, engine.coresets[index],
                     scratch.coreset, rows_of(head.out, 0, 0, first), head.lse != nullptr ? head.lse + first : nullptr);
#pragma omp atomic
  engine.states[index].failed += failed;
}

bool is_judged_by_sample(const HeadState& state) {
  return !state.done && !is_dense_float32(state.plan) && state.plan.form != ADAATTN_LOW_RANK && state.probe_sets > 0;
}

// The sample of blocks, or what is left.
void attend_blocks(const Engine& engine, const ForwardPlan& shape, bool sample) {
  // Blocks of all heads are one list, so that few heads keep all threads busy, too.
  for_all(engine, engine.wave_heads * shape.blocks, [&](std::int64_t i, int thread) {
    HeadState& state = engine.states[i / shape.blocks];
    if (state.done || (sample ? !is_judged_by_sample(state) || !is_sampled(i % shape.blocks)
                              : state.sampled && is_sampled(i % shape.blocks)))
      return;
    const adaattn_forward_args head = head_of(*engine.args, engine.head(i / shape.blocks));
    ForwardPlan plan = make_forward_plan(head, 1);
    plan.block = shape.block;
    plan.blocks = shape.blocks;
    const ThreadScratch& scratch = engine.scratch[thread];
    if (state.plan.form == ADAATTN_LOW_RANK) {
      const std::int64_t first = i % shape.blocks * shape.block;
      return attend_low_rank(engine, i / shape.blocks, head, first, std::min(shape.block, shape.rows - first), scratch);
    }
    if (is_dense_float32(state.plan)) return run_forward_task(plan, i % shape.blocks, scratch.forward);
    TileCounts counts;
    Account* account = engine.accounts != nullptr ? engine.accounts + i : nullptr;
    if (account != nullptr) *account = {};
    run_tiled_task(plan, i % shape.blocks, engine.keys_of(i / shape.blocks), state.plan, scratch.forward, scratch.tiled,
                   counts, account);
#pragma omp critical(adaattn_attend)
    state.counts = add(state.counts, counts);
  });
}

// A quarter of the rows tells well enough which heads will miss their budget: those run again before they are whole. Of
// a budget, what the limit on all probe rows is likely to be. Tiled heads err more in some rows than in others.
constexpr double kFarOff = 1.3, kFarOffDense = 1.05;

void judge_sample(const Engine& engine, const ForwardPlan& shape) {
  const double error = engine.args->options.error;
  for (std::int64_t h = 0; h < engine.wave_heads; ++h) {
    HeadState& state = engine.states[h];
    if (!is_judged_by_sample(state)) continue;
    state.sampled = true;
    const SampledError found = sampled_error(engine, h, shape.block);
    const double all = kProbeSets * kProbeRows;  // on which a standard error is smaller
    const double likely = found.error.value + (found.error.limit - found.error.value) * std::sqrt(found.rows / all);
    if (!(likely > (state.plan.form == ADAATTN_DENSE ? kFarOffDense : kFarOff) * error)) continue;
    state.work += cost_share(state.counts, state.plan, engine.work_of(h)) / kSampled;
    ++state.escalations;
    state.plan =
        more_careful(state.plan, found.error.value, error, state.tight, state.escalations, state.dense_precision);
    state.counts = {};
    state.sampled = false;
  }
}

void attend(const Engine& engine) {
  const adaattn_forward_args any = head_of(*engine.args, 0);
  const ForwardPlan shape = make_forward_plan(any, engine.threads);
  if (engine.long_enough() && std::any_of(engine.states, engine.states + engine.wave_heads, is_judged_by_sample)) {
    attend_blocks(engine, shape, true);
    judge_sample(engine, shape);
  }
  attend_blocks(engine, shape, false);
  for (std::int64_t h = 0; h < engine.wave_heads; ++h) engine.states[h].sampled = false;
}

void verify(const Engine& engine) {
  for_all(engine, engine.wave_heads, [&](std::int64_t h, int thread) {
    HeadState& state = engine.states[h];
    if (state.done) return;
    if (is_dense_float32(state.plan)) {
      state.done = true;
      state.work += 1;
      if (engine.args->tile_classes != nullptr)  // an earlier plan's may be there
        std::fill_n(head_of(*engine.args, engine.head(h)).tile_classes, tile_class_count(*engine.args),
                    std::uint8_t{ADAATTN_TILE_HIGH});
      const adaattn_forward_args head = head_of(*engine.args, engine.head(h));
      for (float* masses : {head.summarised_mass, head.omitted_mass})
        if (masses != nullptr) std::fill_n(masses, head.q.shape[2], 0.0F);
      state.estimate = {};
      state.counts = {};
      return;
    }
    const double error = engine.args->options.error;
    state.work += state.plan.form == ADAATTN_LOW_RANK
                      ? low_rank_share(head_of(*engine.args, engine.head(h)), state.plan.rank)
                      : cost_share(state.counts, state.plan, engine.work_of(h));
    state.estimate = probe_error(engine, h, thread);
    state.done = accepts(state.estimate, error) && state.failed == 0;
    if (state.done) return;
    ++state.escalations;
    state.plan =
        more_careful(state.plan, state.estimate.value, error, state.tight, state.escalations, state.dense_precision);
    state.counts = {};
  });
}

double mean_of(const float* rows, std::int64_t count) {
  return rows != nullptr ? std::accumulate(rows, rows + count, 0.0) / static_cast<double>(count)
                         : std::numeric_limits<double>::quiet_NaN();
}

void report_masses(const Engine& engine, std::int64_t index, adaattn_head_report& to) {
  const adaattn_forward_args head = head_of(*engine.args, engine.head(index));
  to.summarised_mass = mean_of(head.summarised_mass, head.q.shape[2]);
  to.omitted_mass = mean_of(head.omitted_mass, head.q.shape[2]);
  const adaattn_head_plan& plan = engine.states[index].plan;
  to.accounted_error = std::numeric_limits<double>::quiet_NaN();
  if (engine.accounts == nullptr || plan.form == ADAATTN_LOW_RANK) return;
  to.accounted_error = 0;
  if (is_dense_float32(plan)) return;
  const std::int64_t blocks = row_blocks(*engine.args, engine.threads);
  Account sum;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Account& of = engine.accounts[index * blocks + block];
    sum = {sum.error + of.error, sum.norm + of.norm};
  }
  if (sum.error > 0) to.accounted_error = std::sqrt(sum.error / sum.norm);
}

void report(const Engine& engine) {
  for (std::int64_t h = 0; h < engine.wave_heads && engine.args->heads != nullptr; ++h) {
    const HeadState& state = engine.states[h];
    adaattn_head_report& to = engine.args->heads[engine.head(h)];
    to.plan = state.plan;
    to.escalations = state.escalations;
    to.estimated_error = state.estimate.value;
    to.estimated_limit = state.estimate.limit;
    to.work = state.work;
    report_masses(engine, h, to);
    if (state.plan.form != ADAATTN_TILED) continue;
    to.tiles = state.counts.visible;
    to.high_tiles = state.counts.high;
    to.low_tiles = state.counts.low;
    to.summarised_tiles = state.counts.summarised;
    to.pooled_tiles = state.counts.pooled;
    to.dropped_tiles = state.counts.dropped;
  }
}

// Adds the seconds since the last call to what.
struct Watch {
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  void add_to(double& what) {
    const auto now = std::chrono::steady_clock::now();
    what += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace

std::size_t adaptive_workspace(const adaattn_forward_args& args) {
  Scratch scratch(nullptr);
  lay_out_engine(args, scratch);
  return scratch.bytes();
}

void adaptive(const adaattn_forward_args& args) {
  Scratch scratch(args.workspace);
  Engine engine = lay_out_engine(args, scratch);
  const double rank_share = static_cast<double>(kScreenRank) / static_cast<double>(args.q.shape[3]);
  engine.work = work_costs(rank_share, engine.parts.int8_screen);
  engine.time = tile_times(args.q.shape[3]);
  adaattn_stage_times times{};
  Watch watch;
  for (engine.first = 0; engine.first < engine.key_heads; engine.first += engine.wave) {
    engine.wave_heads = std::min(engine.wave, engine.key_heads - engine.first) * engine.group;
    measure(engine);
    watch.add_to(times.measure);
    plan_heads(engine);
    watch.add_to(times.plan);
    const auto open = [&] {
      return std::any_of(engine.states, engine.states + engine.wave_heads, [](const HeadState& s) { return !s.done; });
    };
    while (open()) {
      attend(engine);
      watch.add_to(times.attend);
      verify(engine);
      watch.add_to(times.verify);
    }
    report(engine);
  }
  if (args.times != nullptr) *args.times = times;
}

}  // namespace adaattn::cpu
