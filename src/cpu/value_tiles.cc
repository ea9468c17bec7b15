#include "cpu/value_tiles.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/value_tiles.cc"
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

constexpr auto kTileKeys = static_cast<std::size_t>(kBoundTile);

float sum_squares(const float* values, std::size_t count) {  // count a multiple of the vector
  const FloatTag d;
  FloatVector sum = hn::Zero(d);
  for (std::size_t at = 0; at < count; at += kVectorLanes) {
    const FloatVector value = hn::LoadU(d, values + at);
    sum = hn::MulAdd(value, value, sum);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// out [kTileKeys][kTileKeys] = a b, a [kTileKeys][depth] and b [depth][kTileKeys].
void tile_product(const float* a, std::size_t lda, const float* b, std::size_t depth, float* out) {
  for (std::size_t lane = 0; lane < kTileKeys; lane += kPanelLanes) {
    StoreRows<false> store{out + lane, kTileKeys};
    panel_gemm<ALayout::kRowMajor>(kTileKeys, a, lda, b + lane, kTileKeys, depth, store);
  }
}

// Largest singular value of the centred rows, from above: (trace of the Gram matrix's 4th power)^(1/8). Where few
// directions lead, as in trained models, that is a few per cent too much, and never more than 64^(1/8) = 1.7 times.
float largest_singular_value(std::size_t count, std::size_t dim, std::size_t width, const ValueTilesScratch& scratch) {
  const double trace = sum_squares(scratch.rows, kTileKeys * width);
  if (!(trace > 0)) return 0;
  // Of trace 1, so that squares neither overflow nor vanish.
  if (count < kTileKeys) std::fill_n(scratch.transposed, dim * kTileKeys, 0.0F);
  transpose(scratch.rows, width, count, dim, static_cast<float>(1 / trace), scratch.transposed, kTileKeys);
  tile_product(scratch.rows, width, scratch.transposed, dim, scratch.gram);
  tile_product(scratch.gram, kTileKeys, scratch.gram, kTileKeys, scratch.squared);
  const double fourth = sum_squares(scratch.squared, kTileKeys * kTileKeys);
  // Rounding moves the Gram matrix by up to D u of its trace, which is at most 64 of its largest eigenvalues: 1e-3.
  return static_cast<float>(std::sqrt(trace * std::sqrt(std::sqrt(fourth)) * 1.002));
}

// Rows [first, first + count) as float32 in scratch.rows, rows past count 0; adds to what is known of the sizes.
void read_rows(const adaattn_tensor& tensor, std::int64_t b, std::int64_t h, std::int64_t first, std::size_t count,
               std::size_t width, float* rows, double& largest, bool& finite) {
  convert_rows(rows_of(tensor, b, h, first), count, width, rows, width);
  std::fill_n(rows + count * width, (kTileKeys - count) * width, 0.0F);
  for (std::size_t row = 0; row < count; ++row)
    largest = std::max(largest, std::sqrt(static_cast<double>(sum_squares(rows + row * width, width))));
  finite = finite && all_finite({rows, width}, count, width);
}

}  // namespace

void value_tiles_target(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, bool with_spreads,
                        const ValueTilesScratch& scratch, const ValueTiles& tiles) {
  const std::size_t width = padded_width(args.k.shape[3]), width_v = padded_width(args.v.shape[3]);
  const std::int64_t keys = args.key_lengths != nullptr ? args.key_lengths[b] : args.k.shape[2];
  KeySizes sizes = {.key = 0, .value = 0, .finite = true};
  for (std::int64_t first = 0; first < keys; first += kBoundTile) {
    const auto count = static_cast<std::size_t>(std::min(kBoundTile, keys - first));
    read_rows(args.k, b, key_head, first, count, width, scratch.rows, sizes.key, sizes.finite);
    read_rows(args.v, b, key_head, first, count, width_v, scratch.rows, sizes.value, sizes.finite);
    if (!with_spreads) continue;
    const auto tile = static_cast<std::size_t>(first / kBoundTile);
    float* mean = tiles.means + tile * width_v;
    std::fill_n(mean, width_v, 0.0F);
    for (std::size_t row = 0; row < count; ++row)
      for (std::size_t c = 0; c < width_v; ++c) mean[c] += scratch.rows[row * width_v + c];
    for (std::size_t c = 0; c < width_v; ++c) mean[c] /= static_cast<float>(count);
    for (std::size_t row = 0; row < count; ++row)
      for (std::size_t c = 0; c < width_v; ++c) scratch.rows[row * width_v + c] -= mean[c];
    tiles.spreads[tile] = largest_singular_value(count, static_cast<std::size_t>(args.v.shape[3]), width_v, scratch);
  }
  *tiles.sizes = sizes;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(value_tiles_target);

void build_value_tiles(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, bool with_spreads,
                       const ValueTilesScratch& scratch, const ValueTiles& tiles) {
  HWY_DYNAMIC_DISPATCH(value_tiles_target)(args, b, key_head, with_spreads, scratch, tiles);
}

}  // namespace adaattn::cpu
#endif
