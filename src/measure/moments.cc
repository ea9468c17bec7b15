#include "measure/moments.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "measure/moments.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd/rows-inl.h"
#include "measure/products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::measure {
namespace HWY_NAMESPACE {
namespace {

constexpr auto kChunk = static_cast<std::int64_t>(cpu::kKeyTile);

// All rows as float32, in chunks: visit(rows [count][width], count).
template <class Visit>
void for_each_chunk(const cpu::Rows& rows, std::int64_t count, float* scratch, Visit visit) {
  const std::size_t width = cpu::padded_width(static_cast<std::int64_t>(rows.dim));
  for (std::int64_t first = 0; first < count; first += kChunk) {
    const auto taken = static_cast<std::size_t>(std::min(kChunk, count - first));
    cpu::Rows from = rows;
    from.data = static_cast<const std::byte*>(rows.data) + first * rows.row_stride * dtype_size(rows.dtype);
    cpu::HWY_NAMESPACE::convert_rows(from, taken, width, scratch, width);
    visit(scratch, taken, width);
  }
}

void mean_of(const cpu::Rows& rows, std::int64_t count, const MomentsScratch& scratch) {
  std::fill_n(scratch.mean, cpu::padded_width(static_cast<std::int64_t>(rows.dim)), 0.0);
  for_each_chunk(rows, count, scratch.rows, [&](const float* chunk, std::size_t taken, std::size_t width) {
    for (std::size_t row = 0; row < taken; ++row)
      for (std::size_t c = 0; c < width; ++c) scratch.mean[c] += static_cast<double>(chunk[row * width + c]);
  });
  for (std::size_t c = 0; c < rows.dim; ++c) scratch.mean[c] /= static_cast<double>(count);
}

}  // namespace

Moments moments_target(const cpu::Rows& rows, std::int64_t count, const MomentsScratch& scratch) {
  if (count == 0) {
    constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
    return {.largest = kNothing, .crest = kNothing, .outliers = kNothing, .mean = kNothing};
  }
  mean_of(rows, count, scratch);
  const std::size_t all = cpu::padded_width(static_cast<std::int64_t>(rows.dim));
  std::fill_n(scratch.squares, all, 0.0);
  std::fill_n(scratch.largest, all, 0.0F);
  for_each_chunk(rows, count, scratch.rows, [&](const float* chunk, std::size_t taken, std::size_t width) {
    for (std::size_t row = 0; row < taken; ++row)
      for (std::size_t c = 0; c < width; ++c) {
        const float value = chunk[row * width + c];
        scratch.squares[c] += static_cast<double>(value) * static_cast<double>(value);
        scratch.largest[c] = std::max(scratch.largest[c], std::fabs(value));
      }
  });
  double squares = 0, mean = 0, largest = 0;
  for (std::size_t c = 0; c < rows.dim; ++c) {
    squares += scratch.squares[c];
    mean += scratch.mean[c] * scratch.mean[c];
    largest = std::max(largest, static_cast<double>(scratch.largest[c]));
  }
  if (std::isnan(squares)) largest = squares;  // comparisons pass NaN over
  const double elements = static_cast<double>(count) * static_cast<double>(rows.dim);
  const double root = std::sqrt(squares / elements);
  std::int64_t beyond = 0;
  for_each_chunk(rows, count, scratch.rows, [&](const float* chunk, std::size_t taken, std::size_t width) {
    for (std::size_t at = 0; at < taken * width; ++at)
      beyond += static_cast<double>(std::fabs(chunk[at])) > kOutlier * root ? 1 : 0;  // padding is 0
  });
  return {.largest = largest,
          .crest = squares > 0 ? largest / root : std::numeric_limits<double>::quiet_NaN(),
          .outliers = std::isfinite(squares) ? static_cast<double>(beyond) / elements
                                             : std::numeric_limits<double>::quiet_NaN(),
          .mean = squares > 0 ? std::sqrt(mean * static_cast<double>(count) / squares)
                              : std::numeric_limits<double>::quiet_NaN()};
}

void gram_target(const cpu::Rows& rows, std::int64_t count, bool centred, const MomentsScratch& scratch, double* gram) {
  if (centred && count > 0) mean_of(rows, count, scratch);
  std::fill_n(gram, rows.dim * rows.dim, 0.0);
  for_each_chunk(rows, count, scratch.rows, [&](float* chunk, std::size_t taken, std::size_t width) {
    if (centred)
      for (std::size_t row = 0; row < taken; ++row)
        for (std::size_t c = 0; c < rows.dim; ++c)
          chunk[row * width + c] = static_cast<float>(static_cast<double>(chunk[row * width + c]) - scratch.mean[c]);
    upper_gram(chunk, width, taken, scratch.gram, width, width);
    add_upper(scratch.gram, width, rows.dim, gram, rows.dim);
  });
  mirror(gram, rows.dim);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::measure
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::measure {

HWY_EXPORT(moments_target);
HWY_EXPORT(gram_target);

Moments moments(const cpu::Rows& rows, std::int64_t count, const MomentsScratch& scratch) {
  return HWY_DYNAMIC_DISPATCH(moments_target)(rows, count, scratch);
}

void gram(const cpu::Rows& rows, std::int64_t count, bool centred, const MomentsScratch& scratch, double* result) {
  HWY_DYNAMIC_DISPATCH(gram_target)(rows, count, centred, scratch, result);
}

}  // namespace adaattn::measure
#endif
