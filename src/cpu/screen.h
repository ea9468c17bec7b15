// The screen: rank-r stand-ins for q and k whose scores say, at r / D of the cost, which tiles of keys can matter.
//
// (Keys of a tile, D / r and the sample below: docs/decisions/0005-cpu-tiles.md.)
//
// Q Kc^T (keys less their mean, which no softmax sees) is replaced by (Q Z) (Kc Y)^T with Y, Z [D][r]. For a given Y
// with Y^T (Kc^T Kc) Y = I, Z = (Kc^T Kc) Y is the best choice (least squares), and the best Y spans the top
// eigenvectors of (Q^T Q)(Kc^T Kc); a randomized subspace iteration finds it (Halko, Martinsson and Tropp, arXiv
// 0909.4061, algorithm 4.4), without any decomposition larger than r x r.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"

namespace adaattn::cpu {

constexpr std::size_t kScreenRank = 16;   // r
constexpr std::size_t kRankColumns = 32;  // the same in whole panels
constexpr std::size_t kGramRows = 1024;   // rows of q and k, evenly spaced, that the basis is computed from
constexpr std::int64_t kScreenTile = 64;  // keys of the tiles that are kept or left out

// Of one (batch, key head); arrays in the caller's workspace.
struct Screen {
  float* z;            // [D][kScreenRank], for q
  float* k;            // [Nk][kScreenRank], Kc Y
  float* value_means;  // [tiles][Dv rounded up to panels], mean of v over each tile of kScreenTile keys
  float* energy;       // [1] share of ||Q Kc^T||_F^2 that the rank-r product holds, over the sampled rows
  bool* finite;        // [1] whether k and v hold only finite values
};

// Of one thread, while it builds a screen.
struct ScreenScratch {
  float* rows;             // [kKeyTile][width], converted or centred rows
  float *gram_q, *gram_k;  // [width][width]
  float *y, *t;            // [width][kRankColumns]
  float* projected;        // [kKeyTile][kRankColumns]
  float* mean;             // [width], of k
};

inline Screen lay_out_screen(const adaattn_forward_args& args, Scratch& scratch) {
  const auto keys = static_cast<std::size_t>(args.k.shape[2]), tile = static_cast<std::size_t>(kScreenTile);
  return {.z = scratch.take<float>(static_cast<std::size_t>(args.q.shape[3]) * kScreenRank),
          .k = scratch.take<float>(keys * kScreenRank),
          .value_means = scratch.take<float>((keys + tile - 1) / tile * padded_width(args.v.shape[3])),
          .energy = scratch.take<float>(1),
          .finite = scratch.take<bool>(1)};
}

inline ScreenScratch lay_out_screen_thread(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t width = padded_width(std::max(args.q.shape[3], args.v.shape[3]));
  return {.rows = scratch.take<float>(kKeyTile * width),
          .gram_q = scratch.take<float>(width * width),
          .gram_k = scratch.take<float>(width * width),
          .y = scratch.take<float>(width * kRankColumns),
          .t = scratch.take<float>(width * kRankColumns),
          .projected = scratch.take<float>(kKeyTile * kRankColumns),
          .mean = scratch.take<float>(width)};
}

// Builds the screen of one (batch, key head) for all query heads that share it. Directions beyond those that q and k
// have come out as 0.
void build_screen(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, const ScreenScratch& scratch,
                  const Screen& screen);

}  // namespace adaattn::cpu
