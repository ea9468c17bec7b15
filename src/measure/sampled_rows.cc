#include "measure/sampled_rows.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "measure/sampled_rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cmath>
#include <limits>

#include "common/random.h"
#include "common/tensor.h"
#include "common/visibility.h"
#include "cpu/mask_row.h"
#include "cpu/rows.h"
#include "cpu/simd/exp2-inl.h"
#include "cpu/simd/rows-inl.h"
#include "measure/products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::measure {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr auto kTile = static_cast<std::int64_t>(cpu::kKeyTile);
constexpr std::size_t kStep = cpu::kMaxPanelLanes;  // whatever the instruction set, so that work is the same

// A tile of keys and the lanes, whole panels, of the rows that see any of it.
struct Tile {
  std::int64_t first;
  std::size_t keys, low, high;
  std::size_t lanes() const { return high - low; }
};

struct Head {
  const adaattn_measure_args& args;
  std::int64_t b, h, key_head;
  const Sample& sample;
  const SampleScratch& scratch;
  Visibility visibility;

  float* tile_at(const Tile& tile) const {
    return scratch.probabilities + static_cast<std::size_t>(tile.first) * sample.lanes + tile.low;
  }
};

template <class Visit>
void for_each_tile(const Head& head, Visit visit) {
  const Sample& sample = head.sample;
  for (std::int64_t first = 0; first < head.visibility.key_count; first += kTile) {
    const std::int64_t end = std::min(first + kTile, head.visibility.key_count);
    Tile tile = {.first = first, .keys = static_cast<std::size_t>(end - first), .low = sample.lanes, .high = 0};
    for (std::size_t lane = 0; lane < sample.count; ++lane) {
      const KeyRange range = visible_keys(head.visibility, sample.rows[lane], sample.rows[lane]);
      if (range.sink_end <= first && (range.begin >= end || range.end <= first)) continue;
      tile.low = std::min(tile.low, lane / kStep * kStep);
      tile.high = lane / kStep * kStep + kStep;
    }
    if (tile.low < tile.high) visit(tile);
  }
}

void load_queries(const Head& head) {
  const adaattn_measure_args& args = head.args;
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), lanes = head.sample.lanes;
  const double scale = args.options.has_scale != 0 ? args.options.scale : 1 / std::sqrt(static_cast<double>(dim));
  for (std::size_t lane = 0; lane < head.sample.count; ++lane)
    cpu::HWY_NAMESPACE::convert_rows(cpu::rows_of(args.q, head.b, head.h, head.sample.rows[lane]), 1, dim,
                                     head.scratch.rows + lane * dim, dim);
  std::fill(head.scratch.rows + head.sample.count * dim, head.scratch.rows + lanes * dim, 0.0F);
  cpu::HWY_NAMESPACE::transpose(head.scratch.rows, dim, lanes, dim, static_cast<float>(scale), head.scratch.queries,
                                lanes);
}

// -inf where the row of a lane does not see a key, and the mask's terms on the others.
void mask_lane(const Head& head, const Tile& tile, std::size_t lane) {
  const adaattn_measure_args& args = head.args;
  const std::int64_t row = head.sample.rows[lane];
  const KeyRange range = visible_keys(head.visibility, row, row);
  const bool masked = args.mask.data != nullptr;
  const std::int64_t end = tile.first + static_cast<std::int64_t>(tile.keys);
  if (!masked && range.begin <= tile.first && range.end >= end) return;
  const cpu::MaskRow mask =
      masked ? cpu::mask_row(args.mask, head.b, head.h, row, 0) : cpu::MaskRow{nullptr, ADAATTN_FLOAT32, 0};
  float* score = head.tile_at(tile) + (lane - tile.low);
  for (std::int64_t key = tile.first; key < end; ++key, score += head.sample.lanes) {
    const bool in_range = key < range.sink_end || (key >= range.begin && key < range.end);
    const float term = !in_range ? kHidden : masked ? cpu::mask_term(mask, key) : 0.0F;
    *score = term == kHidden ? kHidden : *score + term;  // whatever a hidden key holds
  }
}

// Scores of a tile, -inf where hidden, and the largest of each row so far.
void score_tile(const Head& head, const Tile& tile) {
  const adaattn_measure_args& args = head.args;
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), lanes = head.sample.lanes;
  const auto keys = cpu::HWY_NAMESPACE::float_rows(cpu::rows_of(args.k, head.b, head.key_head, tile.first), tile.keys,
                                                   dim, head.scratch.rows);
  float* scores = head.tile_at(tile);
  product<ALayout::kRowMajor, false>(tile.keys, keys.data, keys.ld, head.scratch.queries + tile.low, lanes, dim, scores,
                                     lanes, tile.lanes());
  for (std::size_t lane = tile.low; lane < tile.high; ++lane) {
    if (lane < head.sample.count)
      mask_lane(head, tile, lane);
    else
      for (std::size_t key = 0; key < tile.keys; ++key) scores[key * lanes + lane - tile.low] = kHidden;
  }
  const hn::ScalableTag<float> d;
  for (std::size_t lane = tile.low; lane < tile.high; lane += hn::Lanes(d)) {
    auto top = hn::LoadU(d, head.scratch.states.top + lane);
    for (std::size_t key = 0; key < tile.keys; ++key)
      top = hn::Max(top, hn::LoadU(d, scores + key * lanes + lane - tile.low));
    hn::StoreU(top, d, head.scratch.states.top + lane);
  }
}

void add_tile(const float* tile_sums, const Tile& tile, double* sums) {
  for (std::size_t lane = tile.low; lane < tile.high; ++lane) sums[lane] += static_cast<double>(tile_sums[lane]);
}

// exp(score - largest) of a tile, in place, and its sums.
void exponentiate_tile(const Head& head, const Tile& tile) {
  const hn::ScalableTag<float> d;
  const RowStates& states = head.scratch.states;
  const auto hidden = hn::Set(d, kHidden), log2_e = hn::Set(d, 1.44269504F), one = hn::Set(d, 1.0F);
  for (std::size_t lane = tile.low; lane < tile.high; lane += hn::Lanes(d)) {
    float* column = head.tile_at(tile) + (lane - tile.low);
    const auto top = hn::LoadU(d, states.top + lane);
    auto bottom = hn::LoadU(d, states.bottom + lane);
    auto count = hn::Zero(d), sum = hn::Zero(d), squares = hn::Zero(d), total = hn::Zero(d), weighted = hn::Zero(d);
    for (std::size_t key = 0; key < tile.keys; ++key, column += head.sample.lanes) {
      const auto score = hn::LoadU(d, column);
      const auto gone = hn::Eq(score, hidden);  // false for NaN, where Ne is, too
      const auto below = hn::IfThenZeroElse(gone, hn::Sub(score, top));
      const auto p = hn::IfThenZeroElse(gone, cpu::HWY_NAMESPACE::exp2_near_zero(hn::Mul(below, log2_e)));
      hn::StoreU(p, d, column);
      bottom = hn::Min(bottom, below);
      count = hn::Add(count, hn::IfThenZeroElse(gone, one));
      sum = hn::Add(sum, below);
      squares = hn::MulAdd(below, below, squares);
      total = hn::Add(total, p);
      weighted = hn::MulAdd(p, below, weighted);
    }
    hn::StoreU(bottom, d, states.bottom + lane);
    hn::StoreU(count, d, states.tile_seen + lane);
    hn::StoreU(sum, d, states.tile_sum + lane);
    hn::StoreU(squares, d, states.tile_squares + lane);
    hn::StoreU(total, d, states.tile_total + lane);
    hn::StoreU(weighted, d, states.tile_weighted + lane);
  }
  add_tile(states.tile_seen, tile, states.seen);
  add_tile(states.tile_sum, tile, states.sum);
  add_tile(states.tile_squares, tile, states.squares);
  add_tile(states.tile_total, tile, states.total);
  add_tile(states.tile_weighted, tile, states.weighted);
}

void normalize_tile(const Head& head, const Tile& tile) {
  const hn::ScalableTag<float> d;
  const RowStates& states = head.scratch.states;
  for (std::size_t lane = tile.low; lane < tile.high; ++lane)
    states.tile_total[lane] = states.total[lane] == 0 ? 0.0F : static_cast<float>(1 / states.total[lane]);
  for (std::size_t lane = tile.low; lane < tile.high; lane += hn::Lanes(d)) {
    float* column = head.tile_at(tile) + (lane - tile.low);
    const auto factor = hn::LoadU(d, states.tile_total + lane);
    auto squares = hn::Zero(d);
    for (std::size_t key = 0; key < tile.keys; ++key, column += head.sample.lanes) {
      const auto p = hn::Mul(factor, hn::LoadU(d, column));
      hn::StoreU(p, d, column);
      squares = hn::MulAdd(p, p, squares);
    }
    hn::StoreU(squares, d, states.tile_squares + lane);
  }
  add_tile(states.tile_squares, tile, states.energy);
}

void clear_states(const Head& head) {
  const RowStates& states = head.scratch.states;
  const std::size_t lanes = head.sample.lanes;
  std::fill_n(states.top, lanes, kHidden);
  std::fill_n(states.bottom, lanes, 0.0F);  // less the top
  for (double* of : {states.seen, states.sum, states.squares, states.total, states.weighted, states.energy})
    std::fill_n(of, lanes, 0.0);
}

void summarize_rows(const Head& head, adaattn_head_statistics& statistics) {
  const RowStates& states = head.scratch.states;
  double rows = 0, entropy = 0, peak = 0, deviation = 0, range = 0, energy = 0;
  for (std::size_t lane = 0; lane < head.sample.count; ++lane) {
    const double seen = states.seen[lane], total = states.total[lane];
    if (seen == 0) continue;
    rows += 1;
    entropy += std::log(total) - states.weighted[lane] / total;
    peak += 1 / total;
    const double mean = states.sum[lane] / seen, variance = states.squares[lane] / seen - mean * mean;
    deviation += std::sqrt(variance < 0 ? 0 : variance);  // and NaN stays
    range -= std::isnan(total) ? total : static_cast<double>(states.bottom[lane]);
    energy += states.energy[lane];
  }
  statistics.sampled_rows = static_cast<std::int64_t>(rows);
  statistics.softmax_energy = energy;
  if (rows == 0) return;
  statistics.entropy = entropy / rows;
  statistics.max_probability = peak / rows;
  statistics.score_deviation = deviation / rows;
  statistics.score_range = range / rows;
}

double output_norm(const Head& head, double rows, double& work) {
  const adaattn_measure_args& args = head.args;
  const auto dim = static_cast<std::size_t>(args.v.shape[3]), width = cpu::padded_width(args.v.shape[3]);
  const std::size_t lanes = head.sample.lanes;
  std::fill_n(head.scratch.output, lanes * width, 0.0F);
  for_each_tile(head, [&](const Tile& tile) {
    cpu::HWY_NAMESPACE::convert_rows(cpu::rows_of(args.v, head.b, head.key_head, tile.first), tile.keys, width,
                                     head.scratch.rows, width);
    product<ALayout::kTransposed, true>(tile.lanes(), head.tile_at(tile), lanes, head.scratch.rows, width, tile.keys,
                                        head.scratch.output + tile.low * width, width, width);
    work += static_cast<double>(tile.lanes() * tile.keys * dim);
  });
  double squares = 0;
  for (std::size_t lane = 0; lane < head.sample.count; ++lane)
    for (std::size_t c = 0; c < dim; ++c) {
      const auto value = static_cast<double>(head.scratch.output[lane * width + c]);
      squares += value * value;
    }
  return rows == 0 ? std::numeric_limits<double>::quiet_NaN() : std::sqrt(squares / rows);
}

double exact_core(const Head& head, double* core) {
  const std::size_t lanes = head.sample.lanes, count = head.sample.count;
  double work = 0;
  std::fill_n(core, count * count, 0.0);
  for_each_tile(head, [&](const Tile& tile) {
    upper_gram(head.tile_at(tile), lanes, tile.keys, head.scratch.gram, lanes, tile.lanes());
    add_upper(head.scratch.gram, lanes, std::min(tile.high, count) - tile.low, core + tile.low * count + tile.low,
              count);
    const auto pairs = tile.lanes() * (tile.lanes() + 1) / 2;
    work += static_cast<double>(pairs * tile.keys);
  });
  mirror(core, count);
  return work;
}

double dot(const double* a, const double* b, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// x less its part in the span of the first vectors of the basis.
void project_out(const double* basis, std::size_t vectors, std::size_t lanes, double* x) {
  for (std::size_t i = 0; i < vectors; ++i) {
    const double* vector = basis + i * lanes;
    const double along = dot(vector, x, lanes);
    for (std::size_t lane = 0; lane < lanes; ++lane) x[lane] -= along * vector[lane];
  }
}

// The columns of range made an orthonormal basis (Gram-Schmidt, twice over), in basis and back in range, where the
// other columns become 0. Columns that hold nothing new become 0.
void orthonormalize(const Head& head) {
  const std::size_t lanes = head.sample.lanes, columns = head.sample.columns;
  double* basis = head.scratch.basis;
  for (std::size_t j = 0; j < head.sample.sketch; ++j) {
    double* column = basis + j * lanes;
    for (std::size_t lane = 0; lane < lanes; ++lane)
      column[lane] = static_cast<double>(head.scratch.range[lane * columns + j]);
    const double before = dot(column, column, lanes);
    project_out(basis, j, lanes, column);
    project_out(basis, j, lanes, column);
    const double norm = dot(column, column, lanes);
    // What float32 sums leave of a dependent column is some 1e-6 of it.
    const double factor = norm > 1e-10 * before && norm > 0 ? 1 / std::sqrt(norm) : 0;
    for (std::size_t lane = 0; lane < lanes; ++lane) column[lane] *= factor;
  }
  std::fill_n(head.scratch.range, lanes * columns, 0.0F);
  for (std::size_t j = 0; j < head.sample.sketch; ++j)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      head.scratch.range[lane * columns + j] = static_cast<float>(basis[j * lanes + lane]);
}

// P^T times the basis, for the keys of a tile, [keys][columns].
void project_tile(const Head& head, const Tile& tile) {
  const std::size_t columns = head.sample.columns;
  product<ALayout::kRowMajor, false>(tile.keys, head.tile_at(tile), head.sample.lanes,
                                     head.scratch.range + tile.low * columns, columns, tile.lanes(),
                                     head.scratch.projected, columns, columns);
}

// Equation 4.3: 10 sqrt(2 / pi) times the largest norm that (I - Q Q^T) P leaves of a normal vector.
double residual_bound(const Head& head) {
  const std::size_t lanes = head.sample.lanes;
  double largest = 0;
  for (std::size_t i = 0; i < kTestVectors; ++i) {
    double* test = head.scratch.tests + i * lanes;
    project_out(head.scratch.basis, head.sample.sketch, lanes, test);
    const double norm = std::sqrt(dot(test, test, lanes));
    if (std::isnan(norm)) return norm;
    largest = std::max(largest, norm);
  }
  return 10 * std::sqrt(2 / 3.14159265358979324) * largest;
}

double sketched_core(const Head& head, adaattn_head_statistics& statistics, double* core) {
  const Sample& sample = head.sample;
  const SampleScratch& scratch = head.scratch;
  const std::size_t lanes = sample.lanes, columns = sample.columns;
  double work = 0;
  std::fill_n(scratch.range, lanes * columns, 0.0F);
  for_each_tile(head, [&](const Tile& tile) {
    product<ALayout::kTransposed, true>(tile.lanes(), head.tile_at(tile), lanes,
                                        sample.omega + static_cast<std::size_t>(tile.first) * columns, columns,
                                        tile.keys, scratch.range + tile.low * columns, columns, columns);
    const double pairs = static_cast<double>(tile.lanes() * tile.keys), size = static_cast<double>(sample.sketch);
    work += pairs * (size * 2 * (1 + head.args.power_iterations) + kTestVectors) +
            static_cast<double>(tile.keys) * size * (size + 1) / 2;
  });
  for (std::size_t i = 0; i < kTestVectors; ++i)
    for (std::size_t lane = 0; lane < lanes; ++lane)
      scratch.tests[i * lanes + lane] = static_cast<double>(scratch.range[lane * columns + sample.sketch + i]);
  orthonormalize(head);
  for (int power = 0; power < head.args.power_iterations; ++power) {
    // The next range is summed up in gram, which is free until the core, and at least as large.
    std::fill_n(scratch.gram, lanes * columns, 0.0F);
    for_each_tile(head, [&](const Tile& tile) {
      project_tile(head, tile);
      product<ALayout::kTransposed, true>(tile.lanes(), head.tile_at(tile), lanes, scratch.projected, columns,
                                          tile.keys, scratch.gram + tile.low * columns, columns, columns);
    });
    std::copy_n(scratch.gram, lanes * columns, scratch.range);
    orthonormalize(head);
  }
  statistics.softmax_residual = residual_bound(head);
  std::fill_n(core, sample.sketch * sample.sketch, 0.0);
  for_each_tile(head, [&](const Tile& tile) {
    project_tile(head, tile);
    upper_gram(scratch.projected, columns, tile.keys, scratch.gram, columns, columns);
    add_upper(scratch.gram, columns, sample.sketch, core, sample.sketch);
  });
  mirror(core, sample.sketch);
  return work;
}

}  // namespace

SampleWork measure_rows_target(const adaattn_measure_args& args, std::int64_t b, std::int64_t h, const Sample& sample,
                               const SampleScratch& scratch, adaattn_head_statistics& statistics, double* core) {
  const std::int64_t keys = args.key_lengths != nullptr ? args.key_lengths[b] : args.k.shape[2];
  const Head head = {.args = args,
                     .b = b,
                     .h = h,
                     .key_head = h / (args.q.shape[1] / args.k.shape[1]),
                     .sample = sample,
                     .scratch = scratch,
                     .visibility = make_visibility(args.options, args.q.shape[2], keys)};
  SampleWork work{};
  load_queries(head);
  clear_states(head);
  for_each_tile(head, [&](const Tile& tile) {
    score_tile(head, tile);
    work.scores += static_cast<double>(tile.lanes() * tile.keys) * static_cast<double>(args.q.shape[3]);
  });
  for_each_tile(head, [&](const Tile& tile) { exponentiate_tile(head, tile); });
  for_each_tile(head, [&](const Tile& tile) { normalize_tile(head, tile); });
  summarize_rows(head, statistics);
  if ((args.statistics & ADAATTN_STATISTIC_OUTPUT) != 0 && args.v.data != nullptr)
    statistics.output_norm = output_norm(head, static_cast<double>(statistics.sampled_rows), work.output);
  if (core != nullptr && (args.statistics & ADAATTN_STATISTIC_SOFTMAX_SPECTRUM) != 0) {
    statistics.softmax_residual = 0;
    work.spectrum = sample.sketch != 0 ? sketched_core(head, statistics, core) : exact_core(head, core);
  }
  return work;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::measure
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::measure {

HWY_EXPORT(measure_rows_target);

void draw_sample(const adaattn_measure_args& args, const Sample& sample, int threads) {
  const auto queries = static_cast<double>(args.q.shape[2]);
  for (std::size_t i = 0; i < sample.count; ++i) {
    const auto part = static_cast<double>(i) + random_uniform(args.seed, i);
    const auto row = static_cast<std::int64_t>(part / static_cast<double>(sample.count) * queries);
    const std::int64_t least = i == 0 ? 0 : sample.rows[i - 1] + 1;  // parts of one row, where rounding can go wrong
    sample.rows[i] = clamp_index(row, least, args.q.shape[2] - static_cast<std::int64_t>(sample.count - i));
  }
  const std::size_t used = sample.sketch == 0 ? 0 : sample.sketch + kTestVectors;
  const std::uint64_t seed = random_bits(args.seed, ~std::uint64_t{0});
#pragma omp parallel for num_threads(threads)
  for (std::int64_t key = 0; key < (used != 0 ? args.k.shape[2] : 0); ++key)
    for (std::size_t c = 0; c < sample.columns; ++c) {
      const std::size_t at = static_cast<std::size_t>(key) * sample.columns + c;
      sample.omega[at] = c < used ? static_cast<float>(random_normal(seed, at)) : 0.0F;
    }
}

SampleWork measure_rows(const adaattn_measure_args& args, std::int64_t b, std::int64_t h, const Sample& sample,
                        const SampleScratch& scratch, adaattn_head_statistics& statistics, double* core) {
  return HWY_DYNAMIC_DISPATCH(measure_rows_target)(args, b, h, sample, scratch, statistics, core);
}

}  // namespace adaattn::measure
#endif
