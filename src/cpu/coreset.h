// The whole-head low-rank form: attention over a small weighted coreset of the keys.
//
//   sum over keys j of exp(q k_j) u_j  is replaced by  sum over chosen keys s of exp(q k_s + bias_s) z_s(u)
//
// for u = v and u = 1, so that one softmax-like pass over m keys gives numerators, denominators and the LSE. z are
// Nystrom weights, those of the least error in the kernel's feature space. With q and k less their means and on one
// scale, exp(q k) is a Gaussian kernel times factors of q and of k; the keys are chosen by randomly pivoted Cholesky on
// that kernel (Chen, Epperly, Tropp and Webber, arXiv 2207.06503; in blocks, with rejection: Epperly, Tropp and Webber,
// arXiv 2410.03969), a key's residual counted by its share of the softmax of sampled queries. That attention allows
// such coresets: Schroeder and Mackey, arXiv 2602.10056.
//
// Every query must see every key up to the key length: no causal mask, window or mask. The error is not known before it
// is measured: 0.03 to 0.12 of smooth heads with an eighth to a quarter of the keys, over 0.5 of most others.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"
#include "cpu/rows.h"

namespace adaattn::cpu {

struct Coreset {       // of one (batch, key head), for all query heads that share it; in the caller's workspace
  float* keys;         // [m][D], rows of k
  float* values;       // [m][coreset_width(Dv)], z(v), then z(1), then 0
  float* bias;         // [m], added to the scaled score
  std::int64_t* size;  // [1], m: at most the capacity that it was laid out for
};

constexpr std::size_t kCoresetBlock = 32;      // keys proposed at once
constexpr std::size_t kMostCoresetRows = 128;  // sampled queries

struct CoresetScratch {    // of one thread
  std::int64_t* places;    // [capacity], the chosen keys in order
  float* queries;          // [D][kMostCoresetRows], sampled, scaled
  float* rows;             // [kKeyTile][max(D, coreset_width(Dv))]
  float* keys;             // [tiles][D][kKeyTile], centred, on the queries' scale
  float* factor;           // [tiles][capacity][kKeyTile], of Cholesky's
  float* block;            // [tiles][kCoresetBlock][kKeyTile], kernel less what the factor holds
  float *residual, *mass;  // [tiles * kKeyTile]: of the kernel's diagonal; share of the sampled softmax
  float *half, *weight;    // [tiles * kKeyTile]: half the squared norm; that plus the log factor of the key
  float* proposed;         // [kCoresetBlock][max(D, capacity)]
  float* scores;           // [max(kKeyTile, capacity)][kMostCoresetRows]
  float* sums;             // [capacity][coreset_width(Dv)]
  double* solved;          // [capacity][coreset_width(Dv)]
  double* mean;            // [D]
};

inline std::size_t coreset_width(std::int64_t value_dim) { return padded_width(value_dim + 1); }

inline Coreset lay_out_coreset(const adaattn_forward_args& args, std::size_t capacity, Scratch& scratch) {
  return {.keys = scratch.take<float>(capacity * static_cast<std::size_t>(args.k.shape[3])),
          .values = scratch.take<float>(capacity * coreset_width(args.v.shape[3])),
          .bias = scratch.take<float>(capacity),
          .size = scratch.take<std::int64_t>(1)};
}

inline CoresetScratch lay_out_coreset_thread(const adaattn_forward_args& args, std::size_t capacity, Scratch& scratch) {
  const auto dim = static_cast<std::size_t>(args.k.shape[3]), keys = static_cast<std::size_t>(args.k.shape[2]);
  const std::size_t width = coreset_width(args.v.shape[3]), padded = (keys + kKeyTile - 1) / kKeyTile * kKeyTile;
  return {.places = scratch.take<std::int64_t>(capacity),
          .queries = scratch.take<float>(dim * kMostCoresetRows),
          .rows = scratch.take<float>(kKeyTile * std::max(dim, width)),
          .keys = scratch.take<float>(padded * dim),
          .factor = scratch.take<float>(padded * capacity),
          .block = scratch.take<float>(padded * kCoresetBlock),
          .residual = scratch.take<float>(padded),
          .mass = scratch.take<float>(padded),
          .half = scratch.take<float>(padded),
          .weight = scratch.take<float>(padded),
          .proposed = scratch.take<float>(kCoresetBlock * std::max(dim, capacity)),
          .scores = scratch.take<float>(std::max(kKeyTile, capacity) * kMostCoresetRows),
          .sums = scratch.take<float>(capacity * width),
          .solved = scratch.take<double>(capacity * width),
          .mean = scratch.take<double>(dim)};
}

// Builds the coreset of one (batch, key head), of at most capacity keys, fewer where the kernel has no more rank than
// that. The same on every run. Returns false, with a size of 0, if there is nothing to choose from: no queries or keys,
// or inputs or weights that are not finite.
bool build_coreset(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, std::size_t capacity,
                   const CoresetScratch& scratch, const Coreset& coreset);

// Attention of count query rows over a coreset: out rows, and lse [count] unless it is NULL. Rows whose denominator is
// not positive, which only a coreset that is far too small has, get 0 and -inf; returns how many those are.
std::int64_t attend_coreset(const Rows& queries, std::int64_t count, float scale, const Coreset& coreset,
                            const CoresetScratch& scratch, const Rows& out, float* lse);

// Multiply-adds: build for one key head, attend for each query row.
struct CoresetWork {
  double build, attend;
};
CoresetWork coreset_work(const adaattn_forward_args& args, std::int64_t size);

}  // namespace adaattn::cpu
