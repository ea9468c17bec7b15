// How the backward pass on a CPU is cut into tasks, and its scratch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"

namespace adaattn::cpu {

constexpr std::size_t kGradientKeys = 128;    // keys of one tile
constexpr std::size_t kGradientQueries = 64;  // queries of one block

// A task is every splits-th key tile of one (batch, key head), with all queries that read it: it owns its rows of dk
// and dv, and adds to its own copy of dq. The copies are summed at the end, in order, so that results do not depend on
// which thread ran first.
struct BackwardPlan {
  const adaattn_backward_args* args;
  float scale;
  std::int64_t group;   // query heads per key head
  std::int64_t tiles;   // key tiles per key head
  std::int64_t splits;  // tasks per key head
  std::int64_t tasks;
  std::int64_t rows;           // B * Hq * Nq
  std::size_t width, width_v;  // D and Dv rounded up to whole panels
};

inline BackwardPlan make_backward_plan(const adaattn_backward_args& args, int threads) {
  BackwardPlan plan{};
  plan.args = &args;
  plan.scale = static_cast<float>(args.options.has_scale != 0 ? args.options.scale
                                                              : 1 / std::sqrt(static_cast<double>(args.q.shape[3])));
  plan.group = args.k.shape[1] != 0 ? args.q.shape[1] / args.k.shape[1] : 0;
  constexpr auto kKeys = static_cast<std::int64_t>(kGradientKeys);
  plan.tiles = (args.k.shape[2] + kKeys - 1) / kKeys;
  const std::int64_t heads = args.q.shape[0] * args.k.shape[1];
  // Two tasks a thread even out causal heads; a copy of dq for each thread at most.
  const std::int64_t most = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, plan.tiles));
  plan.splits = heads == 0 ? 1 : std::clamp<std::int64_t>((2 * threads + heads - 1) / heads, 1, most);
  plan.tasks = heads * plan.splits;
  plan.rows = args.q.shape[0] * args.q.shape[1] * args.q.shape[2];
  plan.width = padded_width(args.q.shape[3]);
  plan.width_v = padded_width(args.v.shape[3]);
  return plan;
}

// Shared by all threads.
struct BackwardArrays {
  float* dq;         // [splits][rows][width]
  float* delta;      // [rows] sum over the row of dout * out
  float* reference;  // [rows] lse in units of log2
};

// Of one thread.
struct BackwardScratch {
  float *k, *v;           // [kGradientKeys][width | width_v] where k and v cannot be read in place
  float *dk, *dv;         // [kGradientKeys][width | width_v]
  float *q, *dout;        // [kGradientQueries][width | width_v] where they cannot be read in place
  float* q_panels;        // [panels][D][lanes], scaled
  float* dout_panels;     // [panels][Dv][lanes]
  float *scores, *terms;  // [kGradientKeys][lanes] of one panel
  float* row_terms;       // [lanes][kGradientKeys], the mask's terms before they are transposed
  float *p, *ds;          // [kGradientKeys][kGradientQueries]
  float* factors;         // [kGradientKeys] constant factors for store_rows
};

inline BackwardArrays lay_out_shared(const BackwardPlan& plan, Scratch& scratch) {
  const auto rows = static_cast<std::size_t>(plan.rows), splits = static_cast<std::size_t>(plan.splits);
  return {.dq = scratch.take<float>(splits * rows * plan.width),
          .delta = scratch.take<float>(rows),
          .reference = scratch.take<float>(rows)};
}

inline BackwardScratch lay_out_thread(const BackwardPlan& plan, Scratch& scratch) {
  const std::size_t width = plan.width, width_v = plan.width_v;
  return {.k = scratch.take<float>(kGradientKeys * width),
          .v = scratch.take<float>(kGradientKeys * width_v),
          .dk = scratch.take<float>(kGradientKeys * width),
          .dv = scratch.take<float>(kGradientKeys * width_v),
          .q = scratch.take<float>(kGradientQueries * width),
          .dout = scratch.take<float>(kGradientQueries * width_v),
          .q_panels = scratch.take<float>(kGradientQueries * width),
          .dout_panels = scratch.take<float>(kGradientQueries * width_v),
          .scores = scratch.take<float>(kGradientKeys * kMaxPanelLanes),
          .terms = scratch.take<float>(kGradientKeys * kMaxPanelLanes),
          .row_terms = scratch.take<float>(kGradientKeys * kMaxPanelLanes),
          .p = scratch.take<float>(kGradientKeys * kGradientQueries),
          .ds = scratch.take<float>(kGradientKeys * kGradientQueries),
          .factors = scratch.take<float>(kGradientKeys)};
}

// The first and the last stage: delta and reference of one of plan.rows rows; its dq, the splits' copies summed.
void prepare_gradient_row(const BackwardPlan& plan, std::int64_t row, const BackwardArrays& arrays,
                          const BackwardScratch& scratch);
void finish_gradient_row(const BackwardPlan& plan, std::int64_t row, const BackwardArrays& arrays);

}  // namespace adaattn::cpu
