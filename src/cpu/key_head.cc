#include "cpu/key_head.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/key_head.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/random.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

void subtract_mean(const float* mean, std::size_t count, std::size_t width, float* rows) {
  for (std::size_t row = 0; row < count; ++row)
    for (std::size_t c = 0; c < width; ++c) rows[row * width + c] -= mean[c];
}

// Every step-th of the first rows, in chunks of at most kKeyTile, as float32 rows of the given width: visit(chunk,
// count).
template <class Visit>
void for_each_chunk(const adaattn_tensor& tensor, std::int64_t b, std::int64_t h, std::int64_t tokens,
                    std::int64_t step, std::size_t width, float* chunk, Visit visit) {
  const std::int64_t rows = (tokens + step - 1) / step;
  for (std::int64_t first = 0; first < rows; first += static_cast<std::int64_t>(kKeyTile)) {
    const auto count = static_cast<std::size_t>(std::min(static_cast<std::int64_t>(kKeyTile), rows - first));
    Rows from = rows_of(tensor, b, h, first * step);
    from.row_stride *= step;
    convert_rows(from, count, width, chunk, width);
    visit(first, count);
  }
}

std::int64_t sample_step(std::int64_t rows) {
  return std::max<std::int64_t>(1, rows / std::clamp(rows / 8, kLeastGramRows, kMostGramRows));
}

float dot(const float* a, const float* b, std::size_t count) {
  const FloatTag d;
  FloatVector sum = hn::Zero(d);
  for (std::size_t at = 0; at < count; at += kVectorLanes)
    sum = hn::MulAdd(hn::LoadU(d, a + at), hn::LoadU(d, b + at), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

void subtract(float factor, const float* from, float* to, std::size_t count) {
  for (std::size_t at = 0; at < count; ++at) to[at] -= factor * from[at];
}

// Rows of y [kScreenRank][width] made orthonormal under gram: y gram y^T = I, twice over (Gram-Schmidt). t receives
// y gram. Rows that hold nothing new become 0. What lies past dim is 0.
void orthonormalize(const float* gram, std::size_t dim, std::size_t width, float* y, float* t) {
  for (int pass = 0; pass < 2; ++pass) {
    product<ALayout::kRowMajor, false>(kScreenRank, y, width, gram, width, dim, t, width, width);
    for (std::size_t j = 0; j < kScreenRank; ++j) {
      float *yj = y + j * width, *tj = t + j * width;
      const float before = dot(yj, tj, width);
      for (std::size_t i = 0; i < j; ++i) {
        const float along = dot(yj, t + i * width, width);
        subtract(along, y + i * width, yj, width);
        subtract(along, t + i * width, tj, width);
      }
      const float norm = dot(yj, tj, width);
      // What float32 rounding leaves of a dependent row is about 1e-7 of it, squared.
      const float factor = norm > 1e-12F * before && norm > 0 ? 1 / std::sqrt(norm) : 0.0F;
      for (std::size_t c = 0; c < width; ++c) {
        yj[c] *= factor;
        tj[c] *= factor;
      }
    }
  }
}

double trace_of_product(const float* a, const float* b, std::size_t dim, std::size_t width) {
  double trace = 0;
  for (std::size_t r = 0; r < dim; ++r)
    for (std::size_t c = 0; c < dim; ++c) trace += static_cast<double>(a[r * width + c]) * b[r * width + c];
  return trace;
}

// What differs from one coordinate to the next in no pattern that data has; the same on every run.
float starting_value(std::size_t index) {
  return static_cast<float>(static_cast<double>(random_bits(0, index - 1) >> 11) * 0x1p-52 - 1);
}

// The screen's basis: z, and y for the projection of the keys.
void find_basis(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, std::int64_t nk,
                const KeyHeadScratch& scratch, const KeyHead& to) {
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), width = padded_width(args.q.shape[3]);
  const std::int64_t group = args.q.shape[1] / args.k.shape[1], step_k = sample_step(nk),
                     step_q = sample_step(args.q.shape[2]);
  std::fill_n(scratch.gram_k, width * width, 0.0F);
  for_each_chunk(args.k, b, key_head, nk, step_k, width, scratch.rows, [&](std::int64_t, std::size_t count) {
    subtract_mean(to.mean, count, width, scratch.rows);
    product<ALayout::kTransposed, true>(width, scratch.rows, width, scratch.rows, width, count, scratch.gram_k, width,
                                        width);
  });
  std::copy_n(scratch.gram_k, dim * width, to.spread);
  const std::int64_t sampled = (nk + step_k - 1) / step_k;
  *to.sampled = static_cast<float>(sampled);
  std::fill_n(scratch.gram_q, width * width, 0.0F);
  for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
    for_each_chunk(args.q, b, h, args.q.shape[2], step_q, width, scratch.rows, [&](std::int64_t, std::size_t count) {
      product<ALayout::kTransposed, true>(width, scratch.rows, width, scratch.rows, width, count, scratch.gram_q, width,
                                          width);
    });

  for (std::size_t j = 0; j < kScreenRank; ++j)
    for (std::size_t at = 0; at < width; ++at)
      scratch.y[j * width + at] = at < dim ? starting_value(j * width + at) : 0.0F;
  orthonormalize(scratch.gram_k, dim, width, scratch.y, scratch.t);
  constexpr int kIterations = 2;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    product<ALayout::kRowMajor, false>(kScreenRank, scratch.t, width, scratch.gram_q, width, dim, scratch.y, width,
                                       width);
    orthonormalize(scratch.gram_k, dim, width, scratch.y, scratch.t);
  }
  // ||Q Z||^2 with orthonormal Kc Y is the energy of the product.
  product<ALayout::kRowMajor, false>(kScreenRank, scratch.t, width, scratch.gram_q, width, dim, scratch.columns, width,
                                     width);
  double held = 0, first_held = 0;  // the iteration brings the strongest directions to the front
  for (std::size_t j = 0; j < kScreenRank; ++j) {
    held += dot(scratch.columns + j * width, scratch.t + j * width, width);
    if (j + 1 == kSmallRank) first_held = held;
  }
  const double all = trace_of_product(scratch.gram_q, scratch.gram_k, dim, width);
  *to.energy = all > 0 ? static_cast<float>(held / all) : 1.0F;
  const bool small = dim < 2 * kScreenRank || first_held >= kEnoughEnergy * all;
  *to.rank = static_cast<std::int64_t>(small ? kSmallRank : kScreenRank);
  for (std::size_t c = 0; c < dim; ++c)
    for (std::size_t j = 0; j < kScreenRank; ++j) to.z[c * kScreenRank + j] = scratch.t[j * width + c];
  std::fill_n(to.y, width * kRankColumns, 0.0F);
  for (std::size_t c = 0; c < dim; ++c)
    for (std::size_t j = 0; j < kScreenRank; ++j) to.y[c * kRankColumns + j] = scratch.y[j * width + c];
}

// The keys' coordinates in the screen as bytes, one scale for the tile.
void screen_to_bytes(const float* projected, std::size_t count, std::size_t rank, std::uint8_t* to, float* scale) {
  float largest = 0;
  for (std::size_t row = 0; row < count; ++row)
    for (std::size_t j = 0; j < rank; ++j) largest = std::max(largest, std::abs(projected[row * kRankColumns + j]));
  const float inverse = largest > 0 ? 127 / largest : 0;
  *scale = largest / 127;
  for (std::size_t row = 0; row < count; ++row)
    for (std::size_t j = 0; j < rank; ++j)
      to[row * rank + j] = static_cast<std::uint8_t>(projected[row * kRankColumns + j] * inverse + 128.5F);
}

// to[c] = mean of column c over the rows, plus add[c] (which may be null).
void column_means(const float* rows, std::size_t ld, std::size_t count, std::size_t columns, const float* add,
                  float* to) {
  std::fill_n(to, columns, 0.0F);
  for (std::size_t row = 0; row < count; ++row)
    for (std::size_t c = 0; c < columns; ++c) to[c] += rows[row * ld + c];
  const float factor = 1 / static_cast<float>(count);
  for (std::size_t c = 0; c < columns; ++c) to[c] = to[c] * factor + (add != nullptr ? add[c] : 0);
}

// Whether one of the rows lies farther from their mean than kStandsOut times the root mean square.
bool one_stands_out(const float* rows, std::size_t ld, std::size_t count, const float* mean, std::size_t width) {
  const FloatTag d;
  float largest = 0, all = 0;
  for (std::size_t row = 0; row < count; ++row) {
    FloatVector sum = hn::Zero(d);
    for (std::size_t c = 0; c < width; c += kVectorLanes) {  // both are 0 past the columns
      const FloatVector x = hn::Sub(hn::LoadU(d, rows + row * ld + c), hn::LoadU(d, mean + c));
      sum = hn::MulAdd(x, x, sum);
    }
    const float norm = hn::GetLane(hn::SumOfLanes(d, sum));
    largest = std::max(largest, norm);
    all += norm;
  }
  return largest * static_cast<float>(count) > kStandsOut * kStandsOut * all;
}

// The screen's part of one tile of keys (less their mean) and values.
void screen_tile(const float* k, std::size_t ld_k, std::size_t dim, const float* v, std::size_t ld_v, std::size_t dim_v,
                 std::size_t first, std::size_t count, const KeyHeadScratch& scratch, const KeyHead& to) {
  const std::size_t tile = first / static_cast<std::size_t>(kClassTile),
                    width_v = padded_width(static_cast<std::int64_t>(dim_v)), rank = static_cast<std::size_t>(*to.rank);
  product<ALayout::kRowMajor, false>(count, k, ld_k, to.y, kRankColumns, dim, scratch.projected, kRankColumns,
                                     kRankColumns);
  if (to.k8 != nullptr) {
    screen_to_bytes(scratch.projected, count, rank, to.k8 + first * rank, to.k8_scale + tile);
  } else {
    for (std::size_t row = 0; row < count; ++row)
      std::copy_n(scratch.projected + row * kRankColumns, rank, to.k + (first + row) * rank);
  }
  to.stands_out[tile] = one_stands_out(v, ld_v, count, to.value_means + tile * width_v, width_v);
  if (count < static_cast<std::size_t>(kClassTile)) return;  // the screen leaves out whole tiles alone
  for (std::size_t pool = 0; pool < kPoolsOfTile; ++pool) {
    float* values = to.pooled_values + (tile * kPoolsOfTile + pool) * width_v;
    std::fill_n(values, width_v, 0.0F);
    column_means(k + pool * kPool * ld_k, ld_k, kPool, dim, to.mean,
                 to.pooled_keys + (tile * kPoolsOfTile + pool) * dim);
    column_means(v + pool * kPool * ld_v, ld_v, kPool, dim_v, nullptr, values);
  }
}

// visit(first, count) for each tile, whose keys less their mean and values are in scratch.rows and scratch.values,
// until one is not finite: then false.
template <class Visit>
bool for_each_tile(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys,
                   const KeyHeadScratch& scratch, const KeyHead& to, Visit visit) {
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), width = padded_width(args.q.shape[3]);
  const std::size_t dim_v = static_cast<std::size_t>(args.v.shape[3]), width_v = padded_width(args.v.shape[3]);
  for (std::int64_t first = keys.first; first < keys.end; first += kClassTile) {
    const auto count = static_cast<std::size_t>(std::min(kClassTile, keys.end - first));
    convert_rows(rows_of(args.k, b, key_head, first), count, width, scratch.rows, width);
    convert_rows(rows_of(args.v, b, key_head, first), count, width_v, scratch.values, width_v);
    if (!all_finite({scratch.rows, width}, count, dim) || !all_finite({scratch.values, width_v}, count, dim_v))
      return false;
    subtract_mean(to.mean, count, width, scratch.rows);
    visit(static_cast<std::size_t>(first), count);
  }
  return true;
}

}  // namespace

void sampled_mean(const adaattn_tensor& k, std::int64_t b, std::int64_t key_head, std::int64_t keys, float* rows,
                  float* mean) {
  const std::size_t dim = static_cast<std::size_t>(k.shape[3]), width = padded_width(k.shape[3]);
  std::fill_n(mean, width, 0.0F);
  std::size_t sampled = 0;
  for_each_chunk(k, b, key_head, keys, sample_step(keys), width, rows, [&](std::int64_t, std::size_t count) {
    for (std::size_t row = 0; row < count; ++row)
      for (std::size_t c = 0; c < dim; ++c) mean[c] += rows[row * width + c];
    sampled += count;
  });
  for (std::size_t c = 0; c < dim; ++c) mean[c] /= static_cast<float>(std::max<std::size_t>(sampled, 1));
}

bool fill_for_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys,
                     Copies copies, const KeyHeadScratch& scratch, const KeyHead& to) {
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), width = padded_width(args.q.shape[3]);
  const std::size_t dim_v = static_cast<std::size_t>(args.v.shape[3]), width_v = padded_width(args.v.shape[3]);
  return for_each_tile(args, b, key_head, keys, scratch, to, [&](std::size_t first, std::size_t count) {
    float* mean = to.value_means + first / static_cast<std::size_t>(kClassTile) * width_v;
    std::fill_n(mean, width_v, 0.0F);
    column_means(scratch.values, width_v, count, dim_v, nullptr, mean);
    quantize_keys(scratch.rows, width, dim, first, count, copies, to.copy);
    quantize_values(scratch.values, width_v, dim_v, mean, first, count, copies, to.copy);
  });
}

void find_screen_for_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head,
                            const KeyHeadScratch& scratch, const KeyHead& to) {
  find_basis(args, b, key_head, key_count(args, b), scratch, to);
}

void fill_screen_for_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys,
                            const KeyHeadScratch& scratch, const KeyHead& to) {
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), width = padded_width(args.q.shape[3]);
  const std::size_t dim_v = static_cast<std::size_t>(args.v.shape[3]), width_v = padded_width(args.v.shape[3]);
  for_each_tile(args, b, key_head, keys, scratch, to, [&](std::size_t first, std::size_t count) {
    screen_tile(scratch.rows, width, dim, scratch.values, width_v, dim_v, first, count, scratch, to);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(fill_for_target);
HWY_EXPORT(find_screen_for_target);
HWY_EXPORT(fill_screen_for_target);
HWY_EXPORT(sampled_mean);

void begin_key_head(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, std::int64_t keys,
                    const KeyHeadScratch& scratch, KeyHead& to) {
  const std::int64_t all = key_count(args, b);
  to.screened = to.tiled = false;
  to.made = {};
  to.begun = std::min(all, (keys + kClassTile - 1) / kClassTile * kClassTile);
  find_key_mean(args.k, b, key_head, all, scratch.rows, to.mean);
  *to.finite = fill_tiles(args, b, key_head, {0, to.begun}, to.copies, scratch, to);
}

bool fill_tiles(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys, Copies copies,
                const KeyHeadScratch& scratch, const KeyHead& to) {
  return HWY_DYNAMIC_DISPATCH(fill_for_target)(args, b, key_head, keys, copies, scratch, to);
}

void find_key_mean(const adaattn_tensor& k, std::int64_t b, std::int64_t key_head, std::int64_t keys, float* rows,
                   float* mean) {
  HWY_DYNAMIC_DISPATCH(sampled_mean)(k, b, key_head, keys, rows, mean);
}

void find_screen(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, const KeyHeadScratch& scratch,
                 const KeyHead& to) {
  HWY_DYNAMIC_DISPATCH(find_screen_for_target)(args, b, key_head, scratch, to);
}

void fill_screen(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, KeySpan keys,
                 const KeyHeadScratch& scratch, const KeyHead& to) {
  HWY_DYNAMIC_DISPATCH(fill_screen_for_target)(args, b, key_head, keys, scratch, to);
}

}  // namespace adaattn::cpu
#endif
