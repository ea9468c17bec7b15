// How attention of few query rows (decoding) is cut into tasks on a CPU, and its scratch memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"

namespace adaattn::cpu {

constexpr std::int64_t kMaxDecodeRows = 8;  // query rows that share a key head; more fill the lanes of forward.cc well

// A task reads a run of the keys of one (batch, key head) once, for all its rows; the tasks of a head are merged at the
// end.
struct DecodePlan {
  const adaattn_forward_args* args;
  float scale;
  std::int64_t rows;    // group * Nq
  std::int64_t tiles;   // key tiles per key head
  std::int64_t splits;  // tasks per key head
  std::int64_t tasks;
  std::size_t width, width_v;  // D and Dv rounded up to whole panels
};

inline DecodePlan make_decode_plan(const adaattn_forward_args& args, int threads) {
  const ForwardPlan forward = make_forward_plan(args, threads);
  const std::int64_t heads = args.q.shape[0] * args.k.shape[1];
  DecodePlan plan{};
  plan.args = &args;
  plan.scale = forward.scale;
  plan.rows = forward.rows;
  constexpr auto kTile = static_cast<std::int64_t>(kKeyTile);
  plan.tiles = (args.k.shape[2] + kTile - 1) / kTile;
  const std::int64_t most = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, plan.tiles));
  plan.splits = heads == 0 ? 1 : std::clamp<std::int64_t>((2 * threads + heads - 1) / heads, 1, most);
  plan.tasks = heads * plan.splits;
  plan.width = padded_width(args.q.shape[3]);
  plan.width_v = padded_width(args.v.shape[3]);
  return plan;
}

// What a task leaves for the merge, per row.
struct DecodeRow {
  double reference;  // in units of log2; probabilities are relative to 2^reference
  double sum;        // of probabilities
  double moment;     // of p * log2(p), for the entropy
  float top;         // largest score
};

// Shared by all threads.
struct DecodeArrays {
  DecodeRow* rows;  // [tasks][kMaxDecodeRows]
  float* out;       // [tasks][kMaxDecodeRows][width_v], sums of p v
};

// Of one thread.
struct DecodeScratch {
  float* q;             // [kMaxDecodeRows][width], scaled
  float* compensation;  // [kMaxDecodeRows][width_v], what rounding took from out (Kahan)
  float* scores;        // [kMaxDecodeRows][kKeyTile]: scores, then probabilities
  float *k, *v;         // [kKeyTile][width | width_v] where k and v cannot be read in place
  float* v_clean;       // [kKeyTile][width_v], v without its non-finite values where some rows must not see them
};

inline DecodeArrays lay_out_shared(const DecodePlan& plan, Scratch& scratch) {
  const auto rows = static_cast<std::size_t>(plan.tasks * kMaxDecodeRows);
  return {.rows = scratch.take<DecodeRow>(rows), .out = scratch.take<float>(rows * plan.width_v)};
}

inline DecodeScratch lay_out_thread(const DecodePlan& plan, Scratch& scratch) {
  constexpr auto kRows = static_cast<std::size_t>(kMaxDecodeRows);
  return {.q = scratch.take<float>(kRows * plan.width),
          .compensation = scratch.take<float>(kRows * plan.width_v),
          .scores = scratch.take<float>(kRows * kKeyTile),
          .k = scratch.take<float>(kKeyTile * plan.width),
          .v = scratch.take<float>(kKeyTile * plan.width_v),
          .v_clean = scratch.take<float>(kKeyTile * plan.width_v)};
}

}  // namespace adaattn::cpu
