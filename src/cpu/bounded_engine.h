// One call of the bounded kernel: what is known of each head and block of queries, and the workspace.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>

#include "cpu/bounded_block.h"
#include "cpu/double_rows.h"
#include "cpu/forward_plan.h"
#include "cpu/head_problem.h"
#include "cpu/value_tiles.h"

namespace adaattn::cpu::bounds {

constexpr std::int64_t kPilotPanels = 4;  // of kMaxPanelLanes queries
constexpr auto kPilotQueries = static_cast<std::int64_t>(kMaxPanelLanes);

struct HeadState {
  adaattn_form form;
  bool done;
  double allowed;  // squared error of a panel per tile that it sees
  double bound;    // of the relative error
  double work;     // share of dense attention's multiply-adds so far
  int escalations;
  BlockBound total;
};

struct BlockState {
  BlockBound bound;
  bool wanted;      // to be run
  bool summarises;  // may summarise tiles
};

struct ThreadScratch {
  ForwardScratch forward;
  BoundedScratch bounded;
  ValueTilesScratch values;
  DoubleScratch doubles;
};

// Everything in the workspace.
struct Engine {
  const adaattn_forward_args* args;
  int threads;
  bool tiles_pay;      // for this size
  std::int64_t heads;  // B * Hq
  std::int64_t block, blocks;
  ValueTiles* values;        // [B * Hk]
  HeadState* states;         // [heads]
  BlockState* block_states;  // [heads][blocks]
  std::int64_t* order;       // [blocks]
  BlockBound* pilots;        // [heads][kPilotPanels]
  float* pilot_out;          // [heads][kPilotPanels][kPilotQueries][Dv]
  float* max_probability;    // [heads][Nq]
  double *out, *lse;         // [Nq][Dv] and [Nq], of one head in FP64
  ThreadScratch* scratch;    // [threads]
};

// body(index, scratch of the thread) for all indices, in any order.
template <class Body>
void for_all(const Engine& engine, std::int64_t count, Body body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(engine.threads)
  for (std::int64_t index = 0; index < count; ++index) body(index, engine.scratch[omp_get_thread_num()]);
}

inline const ValueTiles& values_of(const Engine& engine, std::int64_t head) {
  return engine.values[key_head_of(*engine.args, head)];
}

// Multiply-adds of tiles, as a share of dense attention's.
inline double tile_work(const adaattn_forward_args& args, const BlockBound& block) {
  if (block.tiles == 0) return 1;
  const auto d = static_cast<double>(args.q.shape[3]), dv = static_cast<double>(args.v.shape[3]);
  const double summarised = static_cast<double>(block.summarised) / static_cast<double>(block.tiles);
  return 1 - summarised * (1 - 1.0 / kBoundTile) * dv / (d + dv);
}

// Fills the classes of dense heads' tiles, their masses, and the reports of all heads, as far as they are asked for.
void report(const Engine& engine);

}  // namespace adaattn::cpu::bounds
