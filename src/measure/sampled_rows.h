// Softmax over a few sampled rows of one head: its statistics, the norm of the output, and its singular values.
//
// Singular values come from the Gram matrix of the sampled rows, or from a randomized sketch of it: Q spans P Omega,
// Omega Gaussian, after power iterations (P P^T)^p P Omega with an orthonormal basis in between, and the core is
// (Q^T P)(Q^T P)^T (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1; what Q leaves out is
// estimated by its equation 4.3).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"

namespace adaattn::measure {

constexpr std::size_t kTestVectors = 10;

struct Sample {         // the same for all heads
  std::int64_t* rows;   // [lanes], the first count ascending
  std::size_t count;    // M
  std::size_t lanes;    // M rounded up to panels
  std::size_t sketch;   // L, 0: none
  std::size_t columns;  // L + kTestVectors rounded up to panels
  float* omega;         // [Nk][columns] standard normal, 0 in the padding; only with a sketch
  std::size_t core() const { return sketch != 0 ? sketch : count; }
};

struct RowStates {  // [lanes] each
  float *top, *bottom;
  float *tile_seen, *tile_sum, *tile_squares, *tile_total, *tile_weighted;  // of one tile, in float32
  double *seen, *sum, *squares, *total, *weighted, *energy;  // of scores less the top: count, sum, squares;
                                                             // of softmax: sum, score times it, squares
};

struct SampleScratch {   // of one thread
  float* probabilities;  // [Nk][lanes], scores first
  float* queries;        // [D][lanes], scaled
  float* rows;           // [max(cpu::kKeyTile, lanes)][max(D, Dv) in panels], converted
  float* output;         // [lanes][Dv in panels]
  RowStates states;
  float* gram;       // [max(lanes, columns)]^2
  float* range;      // [lanes][columns]: P Omega, then its basis
  float* projected;  // [cpu::kKeyTile][columns]
  double* basis;     // [sketch][lanes]
  double* tests;     // [kTestVectors][lanes]
};

inline Sample lay_out_sample(const adaattn_measure_args& args, Scratch& scratch) {
  Sample sample{};
  sample.count = static_cast<std::size_t>(std::min(args.sample_rows, args.q.shape[2]));
  sample.lanes = cpu::padded_width(static_cast<std::int64_t>(sample.count));
  const auto asked = static_cast<std::size_t>(args.sketch);
  sample.sketch = asked < sample.count ? asked : 0;
  sample.columns = sample.sketch == 0 ? 0 : cpu::padded_width(args.sketch + static_cast<std::int64_t>(kTestVectors));
  sample.rows = scratch.take<std::int64_t>(sample.lanes);
  sample.omega = scratch.take<float>(static_cast<std::size_t>(args.k.shape[2]) * sample.columns);
  return sample;
}

inline SampleScratch lay_out_sample_thread(const adaattn_measure_args& args, const Sample& sample, Scratch& scratch) {
  const std::size_t lanes = sample.lanes, columns = sample.columns, widest = std::max(lanes, columns);
  const std::size_t width = cpu::padded_width(std::max(args.q.shape[3], args.v.shape[3]));
  return {.probabilities = scratch.take<float>(static_cast<std::size_t>(args.k.shape[2]) * lanes),
          .queries = scratch.take<float>(static_cast<std::size_t>(args.q.shape[3]) * lanes),
          .rows = scratch.take<float>(std::max(cpu::kKeyTile, lanes) * width),
          .output = scratch.take<float>(lanes * width),
          .states = {.top = scratch.take<float>(lanes),
                     .bottom = scratch.take<float>(lanes),
                     .tile_seen = scratch.take<float>(lanes),
                     .tile_sum = scratch.take<float>(lanes),
                     .tile_squares = scratch.take<float>(lanes),
                     .tile_total = scratch.take<float>(lanes),
                     .tile_weighted = scratch.take<float>(lanes),
                     .seen = scratch.take<double>(lanes),
                     .sum = scratch.take<double>(lanes),
                     .squares = scratch.take<double>(lanes),
                     .total = scratch.take<double>(lanes),
                     .weighted = scratch.take<double>(lanes),
                     .energy = scratch.take<double>(lanes)},
          .gram = scratch.take<float>(widest * widest),
          .range = scratch.take<float>(lanes * columns),
          .projected = scratch.take<float>(cpu::kKeyTile * columns),
          .basis = scratch.take<double>(sample.sketch * lanes),
          .tests = scratch.take<double>(sample.sketch != 0 ? kTestVectors * lanes : 0)};
}

// One random row in each of count even parts, and the sketch's normal numbers.
void draw_sample(const adaattn_measure_args& args, const Sample& sample, int threads);

struct SampleWork {  // multiply-adds
  double scores, output, spectrum;
};

// Fills the fields of statistics that are about rows, outputs and the softmax's spectrum; core [S][S], or NULL.
SampleWork measure_rows(const adaattn_measure_args& args, std::int64_t b, std::int64_t h, const Sample& sample,
                        const SampleScratch& scratch, adaattn_head_statistics& statistics, double* core);

}  // namespace adaattn::measure
