// Scratch memory of the backward pass over tiles in classes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/scratch.h"
#include "cpu/backward_plan.h"

namespace adaattn::cpu {

constexpr std::int64_t kGradientTile = 64;  // keys of a class
constexpr std::size_t kPoolKeys = 16;
constexpr std::size_t kPools = static_cast<std::size_t>(kGradientTile) / kPoolKeys;

// Of one thread, beside the BackwardScratch.
struct TiledGradientScratch {
  float *mean, *mean_gradient;      // [width_v] of a tile's v
  float* masses;                    // [kGradientQueries] mass / keys of a summarised tile
  float *pool_k, *pool_k_gradient;  // [kPools][width]
  float *pool_v, *pool_v_gradient;  // [kPools][width_v]
  float *pool_p, *pool_ds;          // [kPools][kGradientQueries]
};

inline TiledGradientScratch lay_out_tiled_gradient(const BackwardPlan& plan, Scratch& scratch) {
  return {.mean = scratch.take<float>(plan.width_v),
          .mean_gradient = scratch.take<float>(plan.width_v),
          .masses = scratch.take<float>(kGradientQueries),
          .pool_k = scratch.take<float>(kPools * plan.width),
          .pool_k_gradient = scratch.take<float>(kPools * plan.width),
          .pool_v = scratch.take<float>(kPools * plan.width_v),
          .pool_v_gradient = scratch.take<float>(kPools * plan.width_v),
          .pool_p = scratch.take<float>(kPools * kGradientQueries),
          .pool_ds = scratch.take<float>(kPools * kGradientQueries)};
}

}  // namespace adaattn::cpu
