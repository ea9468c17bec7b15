#include "cpu/coreset.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/coreset.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/random.h"
#include "cpu/simd/exp2-inl.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504F;
constexpr auto kTile = static_cast<std::int64_t>(kKeyTile);

// exp of count numbers in place, count a multiple of kMaxPanelLanes.
void exponentiate(float* x, std::size_t count) {
  const hn::ScalableTag<float> d;
  const auto log2_e = hn::Set(d, kLog2E), lowest = hn::Set(d, -80.0F);
  for (std::size_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto value = hn::LoadU(d, x + i);  // what is nearly 0 becomes 0
    hn::StoreU(hn::IfThenZeroElse(hn::Lt(value, lowest), exp2_near_zero(hn::Mul(value, log2_e))), d, x + i);
  }
}

struct Build {
  const adaattn_forward_args& args;
  std::int64_t b, key_head;
  std::size_t capacity;
  const CoresetScratch& scratch;
  std::int64_t keys;  // up to the key length
  std::size_t dim;
  std::size_t samples;  // queries, a multiple of kMaxPanelLanes
  double scale;
  double ratio;  // of k's scale to that of the geometric mean

  std::int64_t tiles() const { return (keys + kTile - 1) / kTile; }
  std::size_t keys_of(std::int64_t tile) const {
    return static_cast<std::size_t>(std::min(kTile, keys - tile * kTile));
  }
  float* keys_at(std::int64_t tile) const { return scratch.keys + static_cast<std::size_t>(tile) * dim * kKeyTile; }
  float* factor_at(std::int64_t tile) const {
    return scratch.factor + static_cast<std::size_t>(tile) * capacity * kKeyTile;
  }
  float* block_at(std::int64_t tile) const {
    return scratch.block + static_cast<std::size_t>(tile) * kCoresetBlock * kKeyTile;
  }
};

// Sampled queries of all heads that share the key head, scaled and transposed: one at random in each of even parts, for
// evenly spaced ones would all come from one column of an image.
void sample_queries(const Build& build) {
  const adaattn_forward_args& args = build.args;
  const std::int64_t group = args.q.shape[1] / args.k.shape[1], all = group * args.q.shape[2];
  for (std::size_t i = 0; i < build.samples; ++i) {
    const double part = static_cast<double>(i) + random_uniform(0, i);
    const auto at = std::min(
        static_cast<std::int64_t>(part * static_cast<double>(all) / static_cast<double>(build.samples)), all - 1);
    const std::int64_t head = build.key_head * group + at / args.q.shape[2];
    convert_rows(rows_of(args.q, build.b, head, at % args.q.shape[2]), 1, build.dim, build.scratch.rows, build.dim);
    for (std::size_t c = 0; c < build.dim; ++c)
      build.scratch.queries[c * build.samples + i] = static_cast<float>(build.scale) * build.scratch.rows[c];
  }
}

const float* load_keys(const Build& build, std::int64_t tile) {
  const Rows rows = rows_of(build.args.k, build.b, build.key_head, tile * kTile);
  convert_rows(rows, build.keys_of(tile), build.dim, build.scratch.rows, build.dim);
  return build.scratch.rows;
}

// Means, the ratio of scales, and per key: centred and scaled row, half its squared norm, and the log of its factor,
// which is that plus its score with the mean query. Returns false if they are not finite.
bool place_keys(Build& build) {
  const CoresetScratch& scratch = build.scratch;
  const std::size_t dim = build.dim, samples = build.samples;
  std::fill_n(scratch.mean, dim, 0.0);
  double squares_k = 0, squares_q = 0;
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    const float* rows = load_keys(build, tile);
    for (std::size_t row = 0; row < build.keys_of(tile); ++row)
      for (std::size_t c = 0; c < dim; ++c) {
        const auto value = static_cast<double>(rows[row * dim + c]);
        scratch.mean[c] += value;
        squares_k += value * value;
      }
  }
  float* mean_q = scratch.proposed;  // free until the first block
  for (std::size_t c = 0; c < dim; ++c) {
    scratch.mean[c] /= static_cast<double>(build.keys);
    squares_k -= static_cast<double>(build.keys) * scratch.mean[c] * scratch.mean[c];
    double sum = 0, squares = 0;
    for (std::size_t i = 0; i < samples; ++i) {
      const auto value = static_cast<double>(scratch.queries[c * samples + i]);
      sum += value, squares += value * value;
    }
    mean_q[c] = static_cast<float>(sum / static_cast<double>(samples));
    squares_q += squares - sum * sum / static_cast<double>(samples);
  }
  squares_k = std::max(squares_k, 0.0) / static_cast<double>(build.keys);
  squares_q = std::max(squares_q, 0.0) / static_cast<double>(samples);
  if (!std::isfinite(squares_k) || !std::isfinite(squares_q)) return false;
  build.ratio = squares_k > 0 && squares_q > 0 ? std::pow(squares_q / squares_k, 0.25) : 1;
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    const float* rows = load_keys(build, tile);
    const std::size_t count = build.keys_of(tile);
    float* to = build.keys_at(tile);
    std::fill_n(to, dim * kKeyTile, 0.0F);
    for (std::size_t row = 0; row < count; ++row) {
      double norm = 0, along = 0;
      for (std::size_t c = 0; c < dim; ++c) {
        const double centred = static_cast<double>(rows[row * dim + c]) - scratch.mean[c];
        const auto placed = static_cast<float>(build.ratio * centred);
        to[c * kKeyTile + row] = placed;
        norm += static_cast<double>(placed) * static_cast<double>(placed);
        along += centred * static_cast<double>(mean_q[c]);
      }
      const std::size_t at = static_cast<std::size_t>(tile * kTile) + row;
      scratch.half[at] = static_cast<float>(norm / 2);
      scratch.weight[at] = static_cast<float>(norm / 2 + along);
      if (!std::isfinite(scratch.weight[at])) return false;
    }
  }
  return true;
}

// Share of the sampled queries' softmax that each key has. Scores are computed twice, which saves holding them.
void weigh_keys(const Build& build) {
  const CoresetScratch& scratch = build.scratch;
  const std::size_t samples = build.samples;
  std::array<double, kMostCoresetRows> total{};
  std::array<float, kMostCoresetRows> top;
  top.fill(-std::numeric_limits<float>::infinity());
  const auto score = [&](std::int64_t tile) {
    product<ALayout::kRowMajor, false>(build.keys_of(tile), load_keys(build, tile), build.dim, scratch.queries, samples,
                                       build.dim, scratch.scores, samples, samples);
  };
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    score(tile);
    const std::size_t count = build.keys_of(tile);
    for (std::size_t i = 0; i < samples; ++i) {
      float largest = top[i];
      for (std::size_t key = 0; key < count; ++key) largest = std::max(largest, scratch.scores[key * samples + i]);
      total[i] *= std::exp(static_cast<double>(top[i]) - static_cast<double>(largest));
      top[i] = largest;
    }
    for (std::size_t key = 0; key < count; ++key)
      for (std::size_t i = 0; i < samples; ++i) scratch.scores[key * samples + i] -= top[i];
    exponentiate(scratch.scores, count * samples);
    for (std::size_t key = 0; key < count; ++key)
      for (std::size_t i = 0; i < samples; ++i) total[i] += static_cast<double>(scratch.scores[key * samples + i]);
  }
  for (std::size_t i = 0; i < samples; ++i) top[i] += static_cast<float>(std::log(total[i]));
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    score(tile);
    const std::size_t count = build.keys_of(tile);
    for (std::size_t key = 0; key < count; ++key)
      for (std::size_t i = 0; i < samples; ++i) scratch.scores[key * samples + i] -= top[i];
    exponentiate(scratch.scores, count * samples);
    for (std::size_t key = 0; key < count; ++key) {
      float sum = 0;
      for (std::size_t i = 0; i < samples; ++i) sum += scratch.scores[key * samples + i];
      // A key that no sampled query looks at may still be another's: it keeps a thousandth of the mean.
      scratch.mass[static_cast<std::size_t>(tile * kTile) + key] =
          sum / static_cast<float>(samples) + 1e-3F / static_cast<float>(build.keys);
    }
  }
}

// Different keys, drawn by residual times mass; their number. Draws of one key again count once.
std::size_t propose(const Build& build, std::uint64_t round, std::array<std::int64_t, kCoresetBlock>& places) {
  const CoresetScratch& scratch = build.scratch;
  double all = 0;
  for (std::int64_t key = 0; key < build.keys; ++key)
    all += std::max(0.0, static_cast<double>(scratch.residual[key])) * static_cast<double>(scratch.mass[key]);
  if (!(all > 1e-12)) return 0;
  std::array<double, kCoresetBlock> marks;
  for (std::size_t i = 0; i < kCoresetBlock; ++i) marks[i] = random_uniform(round, i) * all;
  std::sort(marks.begin(), marks.end());
  std::size_t count = 0, mark = 0;
  double sum = 0;
  for (std::int64_t key = 0; key < build.keys && mark < kCoresetBlock; ++key) {
    sum += std::max(0.0, static_cast<double>(scratch.residual[key])) * static_cast<double>(scratch.mass[key]);
    if (marks[mark] >= sum) continue;
    places[count++] = key;
    while (mark < kCoresetBlock && marks[mark] < sum) ++mark;
  }
  for (std::size_t i = count; i > 1; --i)  // in any order, or keys in front would go first
    std::swap(places[i - 1], places[random_bits(round, kCoresetBlock + i) % i]);
  return count;
}

// The Gaussian kernel of the proposed keys with all keys, less what the factor holds of it.
void residual_block(const Build& build, const std::array<std::int64_t, kCoresetBlock>& places, std::size_t count,
                    std::size_t size) {
  const CoresetScratch& scratch = build.scratch;
  const std::size_t dim = build.dim;
  for (std::size_t i = 0; i < count; ++i) {
    const float* from = build.keys_at(places[i] / kTile) + places[i] % kTile;
    for (std::size_t c = 0; c < dim; ++c) scratch.proposed[i * dim + c] = from[c * kKeyTile];
  }
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    float* block = build.block_at(tile);
    product<ALayout::kRowMajor, false>(count, scratch.proposed, dim, build.keys_at(tile), kKeyTile, dim, block,
                                       kKeyTile, kKeyTile);
    const float* half = scratch.half + tile * kTile;
    for (std::size_t i = 0; i < count; ++i) {
      const float own = scratch.half[places[i]];
      for (std::size_t key = 0; key < kKeyTile; ++key)
        block[i * kKeyTile + key] = std::min(0.0F, block[i * kKeyTile + key] - own - half[key]);
    }
    exponentiate(block, count * kKeyTile);
  }
  if (size == 0) return;
  for (std::size_t i = 0; i < count; ++i) {  // negated, so that the product can be added
    const float* from = build.factor_at(places[i] / kTile) + places[i] % kTile;
    for (std::size_t j = 0; j < size; ++j) scratch.proposed[i * size + j] = -from[j * kKeyTile];
  }
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile)
    product<ALayout::kRowMajor, true>(count, scratch.proposed, size, build.factor_at(tile), kKeyTile, size,
                                      build.block_at(tile), kKeyTile, kKeyTile);
}

// Goes through the proposals in order, takes each with the probability that its residual has not shrunk since it was
// drawn, and adds the taken ones to the factor. Returns the new size.
std::size_t extend(const Build& build, const std::array<std::int64_t, kCoresetBlock>& places, std::size_t count,
                   std::size_t size, std::uint64_t round) {
  const CoresetScratch& scratch = build.scratch;
  std::array<std::array<double, kCoresetBlock>, kCoresetBlock> rest, columns;  // columns of Cholesky's factor, by taken
  std::array<double, kCoresetBlock> drawn;
  for (std::size_t i = 0; i < count; ++i)
    for (std::size_t j = 0; j < count; ++j)
      rest[i][j] = static_cast<double>(build.block_at(places[j] / kTile)[i * kKeyTile + places[j] % kTile]);
  for (std::size_t i = 0; i < count; ++i) drawn[i] = rest[i][i];
  std::array<std::size_t, kCoresetBlock> taken;
  std::size_t added = 0;
  // Below this the residual is rounding, for kernel and factor are float32.
  constexpr double kLeast = 1e-4;
  for (std::size_t i = 0; i < count && size + added < build.capacity; ++i) {
    if (rest[i][i] < kLeast || random_uniform(round, 3 * kCoresetBlock + i) * drawn[i] > rest[i][i]) continue;
    const double root = std::sqrt(rest[i][i]);
    for (std::size_t j = 0; j < count; ++j) columns[added][j] = rest[j][i] / root;
    for (std::size_t j = 0; j < count; ++j)
      for (std::size_t l = 0; l < count; ++l) rest[j][l] -= columns[added][j] * columns[added][l];
    taken[added++] = i;
  }
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    float* residual = scratch.residual + tile * kTile;
    for (std::size_t a = 0; a < added; ++a) {
      float* row = build.factor_at(tile) + (size + a) * kKeyTile;
      std::copy_n(build.block_at(tile) + taken[a] * kKeyTile, kKeyTile, row);
      for (std::size_t l = 0; l < a; ++l) {
        const auto along = static_cast<float>(columns[l][taken[a]]);
        const float* before = build.factor_at(tile) + (size + l) * kKeyTile;
        for (std::size_t key = 0; key < kKeyTile; ++key) row[key] -= along * before[key];
      }
      const auto factor = static_cast<float>(1 / columns[a][taken[a]]);
      for (std::size_t key = 0; key < kKeyTile; ++key) {
        row[key] *= factor;
        residual[key] -= row[key] * row[key];
      }
    }
  }
  for (std::size_t a = 0; a < added; ++a) {
    scratch.places[size + a] = places[taken[a]];
    scratch.residual[places[taken[a]]] = 0;
  }
  return size + added;
}

// z for v and 1: the factor times the values of all keys, each times its factor less the largest, and a back
// substitution through the factor's triangle at the chosen keys.
bool solve_values(const Build& build, std::size_t size, const Coreset& coreset) {
  const CoresetScratch& scratch = build.scratch;
  const adaattn_forward_args& args = build.args;
  const auto dim_v = static_cast<std::size_t>(args.v.shape[3]), width = coreset_width(args.v.shape[3]);
  const float top = *std::max_element(scratch.weight, scratch.weight + build.keys);
  std::fill_n(scratch.sums, size * width, 0.0F);
  for (std::int64_t tile = 0; tile < build.tiles(); ++tile) {
    const std::size_t count = build.keys_of(tile);
    convert_rows(rows_of(args.v, build.b, build.key_head, tile * kTile), count, width, scratch.rows, width);
    for (std::size_t key = 0; key < count; ++key) {
      const float factor = std::exp(scratch.weight[static_cast<std::size_t>(tile * kTile) + key] - top);
      float* row = scratch.rows + key * width;
      row[dim_v] = 1;
      for (std::size_t c = 0; c <= dim_v; ++c) row[c] *= factor;
    }
    product<ALayout::kRowMajor, true>(size, build.factor_at(tile), kKeyTile, scratch.rows, width, count, scratch.sums,
                                      width, width);
  }
  bool finite = true;
  for (std::size_t i = size; i-- > 0;) {
    double* row = scratch.solved + i * width;
    for (std::size_t c = 0; c < width; ++c) row[c] = static_cast<double>(scratch.sums[i * width + c]);
    for (std::size_t j = i + 1; j < size; ++j) {
      const auto entry =
          static_cast<double>(build.factor_at(scratch.places[j] / kTile)[i * kKeyTile + scratch.places[j] % kTile]);
      const double* below = scratch.solved + j * width;
      for (std::size_t c = 0; c <= dim_v; ++c) row[c] -= entry * below[c];
    }
    const auto diagonal =
        static_cast<double>(build.factor_at(scratch.places[i] / kTile)[i * kKeyTile + scratch.places[i] % kTile]);
    for (std::size_t c = 0; c < width; ++c) {
      row[c] /= diagonal;
      coreset.values[i * width + c] = static_cast<float>(row[c]);
      finite = finite && std::isfinite(coreset.values[i * width + c]);
    }
    coreset.bias[i] = top - scratch.weight[scratch.places[i]];
    convert_rows(rows_of(args.k, build.b, build.key_head, scratch.places[i]), 1, build.dim,
                 coreset.keys + i * build.dim, build.dim);
  }
  return finite;
}

}  // namespace

bool build_coreset_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, std::size_t capacity,
                          const CoresetScratch& scratch, const Coreset& coreset) {
  *coreset.size = 0;
  const std::int64_t all = args.q.shape[1] / args.k.shape[1] * args.q.shape[2];
  const auto fitting = static_cast<std::size_t>(clamp_index(all / 16, 1, kMostCoresetRows));
  Build build = {
      .args = args,
      .b = b,
      .key_head = key_head,
      .capacity = capacity,
      .scratch = scratch,
      .keys = args.key_lengths != nullptr ? args.key_lengths[b] : args.k.shape[2],
      .dim = static_cast<std::size_t>(args.k.shape[3]),
      .samples = padded_width(static_cast<std::int64_t>(fitting)),
      .scale = args.options.has_scale != 0 ? args.options.scale : 1 / std::sqrt(static_cast<double>(args.k.shape[3])),
      .ratio = 1};
  if (build.keys == 0 || all == 0 || capacity == 0) return false;
  sample_queries(build);
  const auto padded = static_cast<std::size_t>(build.tiles()) * kKeyTile;
  std::fill_n(scratch.half, padded, 0.0F);
  std::fill_n(scratch.mass, padded, 0.0F);
  if (!place_keys(build)) return false;
  weigh_keys(build);
  std::fill_n(scratch.residual, padded, 1.0F);  // of a Gaussian kernel
  std::size_t size = 0;
  // Rejections slow the last rounds down; a head that rejects most has no more rank to give.
  const std::size_t rounds = 8 + 4 * (capacity / kCoresetBlock);
  for (std::size_t round = 0; round < rounds && size < capacity; ++round) {
    std::array<std::int64_t, kCoresetBlock> places;
    const std::uint64_t seed = random_bits(static_cast<std::uint64_t>(key_head), round);
    const std::size_t count = propose(build, seed, places);
    if (count == 0) break;
    residual_block(build, places, count, size);
    size = extend(build, places, count, size, seed);
  }
  if (size == 0 || !solve_values(build, size, coreset)) return false;
  *coreset.size = static_cast<std::int64_t>(size);
  return true;
}

std::int64_t attend_coreset_target(const Rows& queries, std::int64_t count, float scale, const Coreset& coreset,
                                   const CoresetScratch& scratch, const Rows& out, float* lse) {
  constexpr std::size_t kLanes = kMaxPanelLanes;
  const auto size = static_cast<std::size_t>(*coreset.size);
  const std::size_t dim = queries.dim, dim_v = out.dim, width = coreset_width(static_cast<std::int64_t>(dim_v));
  std::int64_t failed = 0;
  for (std::int64_t first = 0; first < count; first += static_cast<std::int64_t>(kLanes)) {
    const auto taken = static_cast<std::size_t>(std::min(static_cast<std::int64_t>(kLanes), count - first));
    const auto moved = [&](const Rows& rows) {
      Rows result = rows;
      result.data = static_cast<const std::byte*>(rows.data) + first * rows.row_stride * dtype_size(rows.dtype);
      return result;
    };
    convert_rows(moved(queries), taken, dim, scratch.rows, dim);
    std::fill_n(scratch.queries, dim * kLanes, 0.0F);
    transpose(scratch.rows, dim, taken, dim, scale, scratch.queries, kLanes);
    product<ALayout::kRowMajor, false>(size, coreset.keys, dim, scratch.queries, kLanes, dim, scratch.scores, kLanes,
                                       kLanes);
    std::array<float, kLanes> top, factors;
    top.fill(-std::numeric_limits<float>::infinity());
    for (std::size_t s = 0; s < size; ++s)
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        scratch.scores[s * kLanes + lane] += coreset.bias[s];
        top[lane] = std::max(top[lane], scratch.scores[s * kLanes + lane]);
      }
    for (std::size_t s = 0; s < size; ++s)
      for (std::size_t lane = 0; lane < kLanes; ++lane) scratch.scores[s * kLanes + lane] -= top[lane];
    exponentiate(scratch.scores, size * kLanes);
    // Output rows take the place of the query rows.
    product<ALayout::kTransposed, false>(kLanes, scratch.scores, kLanes, coreset.values, width, size, scratch.rows,
                                         width, width);
    for (std::size_t row = 0; row < taken; ++row) {
      const float total = scratch.rows[row * width + dim_v];
      const bool sound = total > 0 && std::isfinite(total);
      factors[row] = sound ? 1 / total : 0.0F;
      if (!sound) {
        ++failed;
        std::fill_n(scratch.rows + row * width, dim_v, 0.0F);
      }
      if (lse != nullptr)
        lse[first + static_cast<std::int64_t>(row)] =
            sound ? top[row] + std::log(total) : -std::numeric_limits<float>::infinity();
    }
    store_rows(scratch.rows, width, factors.data(), taken, moved(out));
  }
  return failed;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(build_coreset_target);
HWY_EXPORT(attend_coreset_target);

bool build_coreset(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, std::size_t capacity,
                   const CoresetScratch& scratch, const Coreset& coreset) {
  return HWY_DYNAMIC_DISPATCH(build_coreset_target)(args, b, key_head, capacity, scratch, coreset);
}

std::int64_t attend_coreset(const Rows& queries, std::int64_t count, float scale, const Coreset& coreset,
                            const CoresetScratch& scratch, const Rows& out, float* lse) {
  return HWY_DYNAMIC_DISPATCH(attend_coreset_target)(queries, count, scale, coreset, scratch, out, lse);
}

CoresetWork coreset_work(const adaattn_forward_args& args, std::int64_t size) {
  const auto keys = static_cast<double>(args.k.shape[2]), d = static_cast<double>(args.k.shape[3]);
  const auto dv = static_cast<double>(args.v.shape[3]), m = static_cast<double>(size);
  const double group = static_cast<double>(args.q.shape[1]) / static_cast<double>(args.k.shape[1]);
  const double samples =
      std::min(static_cast<double>(kMostCoresetRows), group * static_cast<double>(args.q.shape[2]) / 16);
  // Sampled scores twice; the kernel's blocks; Cholesky; the values and their triangle.
  return {.build = keys * d * (2 * samples + m) + keys * m * m / 2 + (keys * m + m * m / 2) * (dv + 1),
          .attend = m * (d + dv + 1)};
}

}  // namespace adaattn::cpu
#endif
