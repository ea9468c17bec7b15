// Scratch memory of the backward pass over tiles in classes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/scratch.h"
#include "cpu/backward_plan.h"
#include "cpu/key_head.h"
#include "plan/head_plan.h"

namespace adaattn::cpu {

// Whether tiles of the head may be rounded, so that its output is not that of its probabilities and values.
inline bool is_rounded(const adaattn_head_plan& plan) {
  return plan.precision != ADAATTN_PRECISION_FLOAT32 || plan.low_precision != ADAATTN_PRECISION_FLOAT32;
}

// Over the query heads of the call.
struct RoundedHeads {
  bool any;
  Copies copies;  // of keys, that some head reads
};
inline RoundedHeads rounded_heads(const adaattn_backward_args& args) {
  RoundedHeads heads{};
  for (std::int64_t h = 0; h < args.q.shape[0] * args.q.shape[1]; ++h) {
    const adaattn_head_plan& plan = args.plans[h];
    heads.any = heads.any || is_rounded(plan);
    for (const std::int32_t precision : {plan.precision, plan.low_precision}) {
      heads.copies.int8 = heads.copies.int8 || precision == ADAATTN_PRECISION_INT8;
      heads.copies.bfloat16 = heads.copies.bfloat16 || precision == ADAATTN_PRECISION_BFLOAT16;
    }
  }
  return heads;
}

// Of one thread, beside the BackwardScratch.
struct TiledGradientScratch {
  float *mean, *mean_gradient;      // [width_v] of a tile's v
  float* masses;                    // [kGradientQueries] mass / keys of a summarised tile
  float *pool_k, *pool_k_gradient;  // [kPoolsOfTile][width]
  float *pool_v, *pool_v_gradient;  // [kPoolsOfTile][width_v]
  float *pool_p, *pool_ds;          // [kPoolsOfTile][kGradientQueries]
  // What rounded scores take:
  float* key_rows;                 // [kKeyTile][width]
  float* key_mean;                 // [width]
  float* centred;                  // [kClassTile][width], keys less their mean
  Quantized copy;                  // of one tile
  std::int32_t *q8, *q16;          // [D in fours | twos][lanes]
  float* query_values;             // [3][lanes], see PanelQueries
  float *emulated_k, *emulated_q;  // [kClassTile][D], [D][lanes]
};

inline TiledGradientScratch lay_out_tiled_gradient(const BackwardPlan& plan, Scratch& scratch) {
  constexpr std::size_t kTile = kClassTile;
  const auto dim = static_cast<std::size_t>(plan.args->q.shape[3]);
  return {.mean = scratch.take<float>(plan.width_v),
          .mean_gradient = scratch.take<float>(plan.width_v),
          .masses = scratch.take<float>(kGradientQueries),
          .pool_k = scratch.take<float>(kPoolsOfTile * plan.width),
          .pool_k_gradient = scratch.take<float>(kPoolsOfTile * plan.width),
          .pool_v = scratch.take<float>(kPoolsOfTile * plan.width_v),
          .pool_v_gradient = scratch.take<float>(kPoolsOfTile * plan.width_v),
          .pool_p = scratch.take<float>(kPoolsOfTile * kGradientQueries),
          .pool_ds = scratch.take<float>(kPoolsOfTile * kGradientQueries),
          .key_rows = scratch.take<float>(kKeyTile * plan.width),
          .key_mean = scratch.take<float>(plan.width),
          .centred = scratch.take<float>(kTile * plan.width),
          .copy = lay_out_quantized_keys(kTile, dim, {.int8 = true, .bfloat16 = true}, scratch),
          .q8 = scratch.take<std::int32_t>(whole(dim, 4) / 4 * kMaxPanelLanes),
          .q16 = scratch.take<std::int32_t>(whole(dim, 2) / 2 * kMaxPanelLanes),
          .query_values = scratch.take<float>(3 * kMaxPanelLanes),
          .emulated_k = scratch.take<float>(kTile * dim),
          .emulated_q = scratch.take<float>(dim * kMaxPanelLanes)};
}

// Shared by all threads.
struct TiledArrays {
  BackwardArrays common;
  float* delta;  // [splits][rows] sums of each split for delta of rounded heads
};

inline TiledArrays lay_out_tiled_shared(const BackwardPlan& plan, Scratch& scratch) {
  return {.common = lay_out_shared(plan, scratch),
          .delta = scratch.take<float>(static_cast<std::size_t>(plan.splits * plan.rows))};
}

}  // namespace adaattn::cpu
