#include "cpu/screen.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/screen.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

// C[rows][columns] = A B (or += with kAdd), columns a multiple of kPanelLanes.
template <ALayout kLayout, bool kAdd>
void product(std::size_t rows, const float* a, std::size_t lda, const float* b, std::size_t ldb, std::size_t depth,
             float* c, std::size_t ldc, std::size_t columns) {
  for (std::size_t lane = 0; lane < columns; lane += kPanelLanes) {
    StoreRows<kAdd> store{c + lane, ldc};
    panel_gemm<kLayout>(rows, a, lda, b + lane, ldb, depth, store);
  }
}

void subtract_mean(const float* mean, std::size_t count, std::size_t width, float* rows) {
  for (std::size_t row = 0; row < count; ++row)
    for (std::size_t c = 0; c < width; ++c) rows[row * width + c] -= mean[c];
}

// Every step-th row, in chunks of at most kKeyTile, as float32 rows of the given width: visit(chunk, count).
template <class Visit>
void for_each_chunk(const adaattn_tensor& tensor, std::int64_t b, std::int64_t h, std::int64_t step, std::size_t width,
                    float* chunk, Visit visit) {
  const std::int64_t rows = (tensor.shape[2] + step - 1) / step;
  for (std::int64_t first = 0; first < rows; first += static_cast<std::int64_t>(kKeyTile)) {
    const auto count = static_cast<std::size_t>(std::min(static_cast<std::int64_t>(kKeyTile), rows - first));
    Rows from = rows_of(tensor, b, h, first * step);
    from.row_stride *= step;
    convert_rows(from, count, width, chunk, width);
    visit(first, count);
  }
}

std::int64_t sample_step(std::int64_t rows) {
  return std::max<std::int64_t>(1, rows / static_cast<std::int64_t>(kGramRows));
}

// Columns of y made orthonormal under gram: y^T gram y = I, twice over (Gram-Schmidt). t receives gram y. Columns that
// hold nothing new become 0.
void orthonormalize(const float* gram, std::size_t dim, std::size_t width, float* y, float* t) {
  for (int pass = 0; pass < 2; ++pass) {
    product<ALayout::kRowMajor, false>(dim, gram, width, y, kRankColumns, dim, t, kRankColumns, kRankColumns);
    for (std::size_t j = 0; j < kScreenRank; ++j) {
      double before = 0;
      for (std::size_t c = 0; c < dim; ++c)
        before += static_cast<double>(y[c * kRankColumns + j]) * t[c * kRankColumns + j];
      for (std::size_t i = 0; i < j; ++i) {
        double along = 0;
        for (std::size_t c = 0; c < dim; ++c)
          along += static_cast<double>(y[c * kRankColumns + j]) * t[c * kRankColumns + i];
        for (std::size_t c = 0; c < dim; ++c) {
          y[c * kRankColumns + j] -= static_cast<float>(along) * y[c * kRankColumns + i];
          t[c * kRankColumns + j] -= static_cast<float>(along) * t[c * kRankColumns + i];
        }
      }
      double norm = 0;
      for (std::size_t c = 0; c < dim; ++c)
        norm += static_cast<double>(y[c * kRankColumns + j]) * t[c * kRankColumns + j];
      // What float32 rounding leaves of a dependent column is about 1e-7 of it, squared.
      const float factor = norm > 1e-12 * before && norm > 0 ? static_cast<float>(1 / std::sqrt(norm)) : 0.0F;
      for (std::size_t c = 0; c < dim; ++c) {
        y[c * kRankColumns + j] *= factor;
        t[c * kRankColumns + j] *= factor;
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
  std::uint64_t x = index * 0x9E3779B97F4A7C15ULL;  // splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<float>(static_cast<double>((x ^ (x >> 31)) >> 11) * 0x1p-52 - 1);
}

}  // namespace

void build_screen_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head,
                         const ScreenScratch& scratch, const Screen& screen) {
  const std::size_t dim = static_cast<std::size_t>(args.q.shape[3]), width = padded_width(args.q.shape[3]);
  const std::size_t dim_v = static_cast<std::size_t>(args.v.shape[3]), width_v = padded_width(args.v.shape[3]);
  const std::int64_t nk = args.k.shape[2], group = args.q.shape[1] / args.k.shape[1];

  std::fill_n(scratch.mean, width, 0.0F);
  const std::int64_t step_k = sample_step(nk), step_q = sample_step(args.q.shape[2]);
  std::size_t sampled = 0;
  for_each_chunk(args.k, b, key_head, step_k, width, scratch.rows, [&](std::int64_t, std::size_t count) {
    for (std::size_t row = 0; row < count; ++row)
      for (std::size_t c = 0; c < dim; ++c) scratch.mean[c] += scratch.rows[row * width + c];
    sampled += count;
  });
  for (std::size_t c = 0; c < dim; ++c) scratch.mean[c] /= static_cast<float>(std::max<std::size_t>(sampled, 1));

  std::fill_n(scratch.gram_k, width * width, 0.0F);
  for_each_chunk(args.k, b, key_head, step_k, width, scratch.rows, [&](std::int64_t, std::size_t count) {
    subtract_mean(scratch.mean, count, width, scratch.rows);
    product<ALayout::kTransposed, true>(width, scratch.rows, width, scratch.rows, width, count, scratch.gram_k, width,
                                        width);
  });
  std::fill_n(scratch.gram_q, width * width, 0.0F);
  for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
    for_each_chunk(args.q, b, h, step_q, width, scratch.rows, [&](std::int64_t, std::size_t count) {
      product<ALayout::kTransposed, true>(width, scratch.rows, width, scratch.rows, width, count, scratch.gram_q, width,
                                          width);
    });

  for (std::size_t at = 0; at < width * kRankColumns; ++at) scratch.y[at] = starting_value(at);
  orthonormalize(scratch.gram_k, dim, width, scratch.y, scratch.t);
  constexpr int kIterations = 3;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    product<ALayout::kRowMajor, false>(dim, scratch.gram_q, width, scratch.t, kRankColumns, dim, scratch.y,
                                       kRankColumns, kRankColumns);
    orthonormalize(scratch.gram_k, dim, width, scratch.y, scratch.t);
  }
  // ||Q Z||^2 with orthonormal Kc Y is the energy of the product.
  double held = 0;
  for (std::size_t j = 0; j < kScreenRank; ++j)
    for (std::size_t r = 0; r < dim; ++r) {
      double row = 0;
      for (std::size_t c = 0; c < dim; ++c)
        row += static_cast<double>(scratch.gram_q[r * width + c]) * scratch.t[c * kRankColumns + j];
      held += row * scratch.t[r * kRankColumns + j];
    }
  const double all = trace_of_product(scratch.gram_q, scratch.gram_k, dim, width);
  *screen.energy = all > 0 ? static_cast<float>(held / all) : 1.0F;

  *screen.finite = true;
  for (std::size_t c = 0; c < dim; ++c)
    std::copy_n(scratch.t + c * kRankColumns, kScreenRank, screen.z + c * kScreenRank);
  for_each_chunk(args.k, b, key_head, 1, width, scratch.rows, [&](std::int64_t first, std::size_t count) {
    *screen.finite = *screen.finite && all_finite({scratch.rows, width}, count, dim);
    subtract_mean(scratch.mean, count, width, scratch.rows);
    product<ALayout::kRowMajor, false>(count, scratch.rows, width, scratch.y, kRankColumns, dim, scratch.projected,
                                       kRankColumns, kRankColumns);
    for (std::size_t row = 0; row < count; ++row)
      std::copy_n(scratch.projected + row * kRankColumns, kScreenRank,
                  screen.k + (static_cast<std::size_t>(first) + row) * kScreenRank);
  });
  for_each_chunk(args.v, b, key_head, 1, width_v, scratch.rows, [&](std::int64_t first, std::size_t count) {
    *screen.finite = *screen.finite && all_finite({scratch.rows, width_v}, count, dim_v);
    for (std::size_t row = 0; row < count; row += static_cast<std::size_t>(kScreenTile)) {
      const std::size_t keys = std::min(static_cast<std::size_t>(kScreenTile), count - row);
      float* mean = screen.value_means +
                    (static_cast<std::size_t>(first) + row) / static_cast<std::size_t>(kScreenTile) * width_v;
      std::fill_n(mean, width_v, 0.0F);
      for (std::size_t key = row; key < row + keys; ++key)
        for (std::size_t c = 0; c < dim_v; ++c) mean[c] += scratch.rows[key * width_v + c];
      for (std::size_t c = 0; c < dim_v; ++c) mean[c] /= static_cast<float>(keys);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(build_screen_target);

void build_screen(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, const ScreenScratch& scratch,
                  const Screen& screen) {
  HWY_DYNAMIC_DISPATCH(build_screen_target)(args, b, key_head, scratch, screen);
}

}  // namespace adaattn::cpu
#endif
