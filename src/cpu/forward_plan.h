// How the forward pass on a CPU is cut into tasks, and the scratch memory that one thread needs for one task.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "common/visibility.h"

namespace adaattn::cpu {

constexpr std::size_t kKeyTile = 256;       // keys whose scores are held at once
constexpr std::size_t kMaxPanelLanes = 32;  // queries side by side in vector lanes: two vectors of the widest set
constexpr std::size_t kMaxBlock = 128;      // queries of one task
constexpr std::int64_t kMaxHeadDim = 256;

// The query rows of all heads that share a key head are one list of group * Nq rows, so that few long rows (decoding)
// fill the lanes too. A task is a block of these rows of one (batch, key head).
struct ForwardPlan {
  const adaattn_forward_args* args;
  float scale;
  std::int64_t group;   // query heads per key head
  std::int64_t rows;    // group * Nq
  std::int64_t block;   // rows per task, a multiple of kMaxPanelLanes
  std::int64_t blocks;  // tasks per (batch, key head)
  std::int64_t tasks;
  // q may be every query_step-th row, from first_query on, of a sequence of query_count queries.
  std::int64_t query_count, first_query, query_step;
};

inline ForwardPlan make_forward_plan(const adaattn_forward_args& args, int threads) {
  ForwardPlan plan{};
  plan.args = &args;
  plan.scale = static_cast<float>(args.options.has_scale != 0 ? args.options.scale
                                                              : 1 / std::sqrt(static_cast<double>(args.q.shape[3])));
  plan.group = args.k.shape[1] != 0 ? args.q.shape[1] / args.k.shape[1] : 0;
  plan.rows = plan.group * args.q.shape[2];
  const std::int64_t heads = args.q.shape[0] * args.k.shape[1];
  // Large blocks read K and V from far memory less often; small ones keep all threads busy to the end.
  plan.block = kMaxBlock;
  constexpr auto kSmallest = static_cast<std::int64_t>(kMaxPanelLanes);
  while (plan.block > kSmallest &&
         (heads * ((plan.rows + plan.block - 1) / plan.block) < 4 * threads || plan.rows <= plan.block / 2))
    plan.block /= 2;
  plan.blocks = (plan.rows + plan.block - 1) / plan.block;
  plan.tasks = heads * plan.blocks;
  plan.query_count = args.q.shape[2];
  plan.query_step = 1;
  return plan;
}

// Elements of a row that is read in whole panels.
inline std::size_t padded_width(std::int64_t dim) {
  return (static_cast<std::size_t>(dim) + kMaxPanelLanes - 1) / kMaxPanelLanes * kMaxPanelLanes;
}

struct ForwardScratch {
  float* q_panels;      // [block / lanes][D][lanes], scaled
  float* out;           // [block / lanes][Dv][lanes], sums of p v
  float* compensation;  // as out, what rounding took from it (Kahan)
  float* scores;        // [kKeyTile][lanes] of one panel: scores, then probabilities
  float* terms;         // [kKeyTile][lanes], the mask's terms
  float* row_terms;     // [lanes][kKeyTile], the same before they are transposed
  float* k_tile;        // [kKeyTile][D] where k cannot be read in place
  float* v_tile;        // [kKeyTile][Dv] where v cannot be read in place
  float* v_clean;       // [kKeyTile][Dv], v without its non-finite values where some rows must not see them
  float* rows;          // [lanes][max(D, Dv)], query rows on their way in, output rows on their way out
  float* state;         // [block / lanes][5][lanes], see RowState
};

inline ForwardScratch lay_out(const adaattn_forward_args& args, Scratch& scratch) {
  const auto d = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  return {.q_panels = scratch.take<float>(kMaxBlock * d),
          .out = scratch.take<float>(kMaxBlock * dv),
          .compensation = scratch.take<float>(kMaxBlock * dv),
          .scores = scratch.take<float>(kKeyTile * kMaxPanelLanes),
          .terms = scratch.take<float>(kKeyTile * kMaxPanelLanes),
          .row_terms = scratch.take<float>(kKeyTile * kMaxPanelLanes),
          .k_tile = scratch.take<float>(kKeyTile * d),
          .v_tile = scratch.take<float>(kKeyTile * dv),
          .v_clean = scratch.take<float>(kKeyTile * dv),
          .rows = scratch.take<float>(kMaxPanelLanes * std::max(d, dv)),
          .state = scratch.take<float>(kMaxBlock * 5)};
}

inline std::int64_t key_count(const adaattn_forward_args& args, std::int64_t b) {
  return args.key_lengths != nullptr ? args.key_lengths[b] : args.k.shape[2];
}

inline Visibility visibility_of(const ForwardPlan& plan, std::int64_t b) {
  const adaattn_forward_args& args = *plan.args;
  Visibility visibility = make_visibility(args.options, plan.query_count, key_count(args, b));
  visibility.first_query = plan.first_query;
  visibility.query_step = plan.query_step;
  return visibility;
}

}  // namespace adaattn::cpu
