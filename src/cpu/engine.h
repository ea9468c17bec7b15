// One call of the adaptive kernel: what is known of each head, the workspace, and sub-problems of the call's problem.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/coreset.h"
#include "cpu/forward_plan.h"
#include "cpu/head_problem.h"
#include "cpu/key_head.h"
#include "cpu/threads.h"
#include "cpu/tiled.h"
#include "plan/head_plan.h"
#include "plan/ladder.h"
#include "verify/estimate.h"

namespace adaattn::cpu {

constexpr auto kLanes = static_cast<std::int64_t>(kMaxPanelLanes);
constexpr std::int64_t kPilotPanels = 4;  // panels of consecutive queries that a rule is tried on
constexpr std::int64_t kPilotRows = kPilotPanels * kLanes;
constexpr std::int64_t kTrialRows = kLanes;  // evenly spaced rows that precisions are tried on
constexpr std::int64_t kLeastTiled = 4096;   // tokens from which on tiles are told apart

// Errors with everything in a precision that a short part of a head already shows to be too large; 0: it does not.
struct Looks {
  double int8 = 0, bfloat16 = 0;
};

struct HeadState {
  adaattn_head_plan plan;
  bool done;               // the head's output stands
  ErrorEstimate estimate;  // 0 for dense float32 heads
  TileCounts counts;
  double work;  // share of dense attention's multiply-adds so far
  int escalations;
  std::int32_t dense_precision;  // the fastest that was accepted on trial rows, short of the plan's own
  int probe_sets;                // of rows that were run exactly to judge the output
  std::int64_t failed;           // rows that a coreset gave no sound result for
  bool sampled;                  // whether the sample of its blocks (cpu/adaptive.cc) was run by its plan
  bool tight;                    // whether its budget is (plan/ladder.h)
  // While it is planned:
  Copies reads;      // what its plan, or trials of it, need of its key head: copies
  bool reads_tiles;  // and the means of values
  Looks looks;
  bool may_be_tiled;
  Precisions precisions;  // of its tiles
  double best;            // time of the plan so far, over float32's
};

struct ThreadScratch {
  ForwardScratch forward;
  TiledScratch tiled;
  KeyHeadScratch key_head;
  CoresetScratch coreset;
  float *exact, *tried;          // [kPilotRows][Dv] rows for planning
  float *exact_lse, *tried_lse;  // [kTrialRows]
};

// Heads go through the stages in waves of a few key heads, so that the workspace and the caches hold what a wave needs.
struct Engine {
  const adaattn_forward_args* args;
  int threads;
  Parts parts;
  TileCosts work, time;
  std::int64_t group;        // query heads per key head
  std::int64_t key_heads;    // B * Hk
  std::int64_t wave;         // key heads at once
  std::int64_t first;        // key head of the wave's first
  std::int64_t wave_heads;   // query heads of the wave now
  KeyHead* keys;             // [wave]
  std::size_t coreset_keys;  // at most, of a low-rank head; 0: no head may be one
  Coreset* coresets;         // [wave * group] of low-rank heads
  HeadState* states;         // [wave * group]
  Account* accounts;         // [wave * group][blocks of rows], or NULL if no masses are asked for
  float* probes;             // [wave * group][kProbeSets][kProbeRows][Dv] exact rows, evenly spaced
  ThreadScratch* scratch;    // [threads]

  std::int64_t head(std::int64_t index) const { return first * group + index; }  // of the call, by index in the wave
  const KeyHead& keys_of(std::int64_t index) const { return keys[index / group]; }
  TileCosts work_of(std::int64_t index) const { return of_rank(work, index); }
  TileCosts time_of(std::int64_t index) const { return of_rank(time, index); }
  TileCosts of_rank(TileCosts costs, std::int64_t index) const {  // costs are those of a screen of kScreenRank
    if (keys_of(index).screened) costs.screen *= static_cast<double>(*keys_of(index).rank) / kScreenRank;
    return costs;
  }
  bool long_enough() const { return std::min(args->q.shape[2], args->k.shape[2]) >= kLeastTiled; }
  float* probes_of(std::int64_t index, int set) const {
    return probes + (index * kProbeSets + set) * kProbeRows * args->v.shape[3];
  }
};

// body(index, thread) for all indices, in any order.
template <class Body>
void for_all(const Engine& engine, std::int64_t count, Body body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(engine.threads)
  for (std::int64_t index = 0; index < count; ++index) body(index, omp_get_thread_num());
}

// The problem of one query head alone, tile classes, too.
inline adaattn_forward_args head_of(const adaattn_forward_args& args, std::int64_t head) {
  adaattn_forward_args one = head_problem(args, head);
  if (args.tile_classes != nullptr) one.tile_classes = args.tile_classes + head * tile_class_count(args);
  return one;
}

// Blocks of rows that a head is cut into, so that few heads keep all threads busy, too.
inline std::int64_t row_blocks(const adaattn_forward_args& args, int threads) {
  adaattn_forward_args one = args;
  one.q.shape[0] = one.q.shape[1] = one.k.shape[1] = 1;
  return make_forward_plan(one, threads).blocks;
}

// count rows from first on, step apart, with the output as float32 in out [count][Dv], the log-sum-exp in lse [count]
// unless NULL, and no other results.
struct RowsProblem {
  adaattn_forward_args args;
  ForwardPlan plan;

  RowsProblem(const adaattn_forward_args& head, std::int64_t first, std::int64_t step, std::int64_t count, float* out,
              float* lse = nullptr)
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
    args.lse = lse;
    args.entropy = args.max_probability = args.summarised_mass = args.omitted_mass = nullptr;
    args.tile_classes = nullptr;
    plan = make_forward_plan(args, 1);
    plan.args = &args;
    plan.query_count = head.q.shape[2];
    plan.first_query = first;
    plan.query_step = step;
  }
  RowsProblem(const RowsProblem&) = delete;
  RowsProblem& operator=(const RowsProblem&) = delete;
};

// Multiply-adds of a low-rank head over those of dense attention; building counts build_weight times.
inline double low_rank_share(const adaattn_forward_args& head, std::int64_t rank, double build_weight = 1) {
  const CoresetWork work = coreset_work(head, rank);
  const auto rows = static_cast<double>(head.q.shape[2]), keys = static_cast<double>(head.k.shape[2]);
  return (build_weight * work.build + rows * work.attend) /
         (rows * keys * static_cast<double>(head.q.shape[3] + head.v.shape[3]));
}

inline bool is_dense_float32(const adaattn_head_plan& plan) {
  return plan.form == ADAATTN_DENSE && plan.precision == ADAATTN_PRECISION_FLOAT32;
}

}  // namespace adaattn::cpu
