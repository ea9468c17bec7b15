// Moves rows between the caller's tensors (any dtype, any strides) and float32 tiles, and transposes tiles.
#if defined(ADAATTN_CPU_SIMD_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_SIMD_ROWS_INL_H_
#undef ADAATTN_CPU_SIMD_ROWS_INL_H_
#else
#define ADAATTN_CPU_SIMD_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/rows.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Without float16 instructions Highway's conversions cut instead of rounding and take infinities for numbers; there
// elements are converted one at a time.
#if (HWY_ARCH_X86 && (HWY_TARGET > HWY_AVX2 || defined(HWY_DISABLE_F16C))) || HWY_TARGET >= HWY_EMU128
inline constexpr bool kHaveFloat16 = false;
#else
inline constexpr bool kHaveFloat16 = true;
#endif

// Rows as float32 with the given leading dimension (>= dim); what lies between dim and width is 0.
HWY_INLINE void convert_rows(const Rows& from, std::size_t count, std::size_t width, float* HWY_RESTRICT to,
                             std::size_t ld) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> d16;
  const hn::Rebind<hwy::bfloat16_t, decltype(d)> db16;
  const std::size_t lanes = hn::Lanes(d);
  for (std::size_t row = 0; row < count; ++row, to += ld) {
    const std::int64_t start = static_cast<std::int64_t>(row) * from.row_stride;
    std::size_t at = 0;
    if (from.element_stride == 1) {
      if (from.dtype == ADAATTN_FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from.data) + start, from.dim * sizeof(float));
        at = from.dim;
      } else if (from.dtype == ADAATTN_FLOAT16) {
        const auto* source = static_cast<const hwy::float16_t*>(from.data) + start;
        for (; kHaveFloat16 && at + lanes <= from.dim; at += lanes)
          hn::StoreU(hn::PromoteTo(d, hn::LoadU(d16, source + at)), d, to + at);
      } else {
        const auto* source = static_cast<const hwy::bfloat16_t*>(from.data) + start;
        for (; at + lanes <= from.dim; at += lanes)
          hn::StoreU(hn::PromoteTo(d, hn::LoadU(db16, source + at)), d, to + at);
      }
    }
    for (; at < from.dim; ++at)
      to[at] = load_element(from.data, start + static_cast<std::int64_t>(at) * from.element_stride, from.dtype);
    for (; at < width; ++at) to[at] = 0;
  }
}

// The rows where they are if they can be read as float32 of the wanted width, else converted into scratch.
struct FloatRows {
  const float* data;
  std::size_t ld;
};
HWY_INLINE FloatRows float_rows(const Rows& from, std::size_t count, std::size_t width, float* scratch) {
  if (from.dtype == ADAATTN_FLOAT32 && from.element_stride == 1 && from.row_stride >= 0 && width == from.dim)
    return {static_cast<const float*>(from.data), static_cast<std::size_t>(from.row_stride)};
  convert_rows(from, count, width, scratch, width);
  return {scratch, width};
}

// Writes float32 rows to the caller's tensor, each times its factor, rounded to nearest even.
HWY_INLINE void store_rows(const float* from, std::size_t ld, const float* factors, std::size_t count, const Rows& to) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  auto* data = const_cast<void*>(to.data);
  for (std::size_t row = 0; row < count; ++row, from += ld) {
    const std::int64_t start = static_cast<std::int64_t>(row) * to.row_stride;
    std::size_t at = 0;
    if (to.element_stride == 1) {
      const auto factor = hn::Set(d, factors[row]);
      if (to.dtype == ADAATTN_FLOAT32) {
        auto* target = static_cast<float*>(data) + start;
        for (; at + lanes <= to.dim; at += lanes) hn::StoreU(hn::Mul(factor, hn::LoadU(d, from + at)), d, target + at);
      } else if (to.dtype == ADAATTN_FLOAT16) {
        const hn::Rebind<hwy::float16_t, decltype(d)> d16;
        auto* target = static_cast<hwy::float16_t*>(data) + start;
        for (; kHaveFloat16 && at + lanes <= to.dim; at += lanes)
          hn::StoreU(hn::DemoteTo(d16, hn::Mul(factor, hn::LoadU(d, from + at))), d16, target + at);
      }
    }
    for (; at < to.dim; ++at)
      store_element(data, start + static_cast<std::int64_t>(at) * to.element_stride, to.dtype, factors[row] * from[at]);
  }
}

// to[c * to_ld + r] = factor * from[r * from_ld + c], in blocks of 4 x 4.
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::size_t from_ld, std::size_t rows, std::size_t columns,
                          float factor, float* HWY_RESTRICT to, std::size_t to_ld) {
  std::size_t r = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Full128<float> d;
  const hn::Repartition<double, decltype(d)> dd;
  const auto scale = hn::Set(d, factor);
  for (; r + 4 <= rows; r += 4) {
    std::size_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const float* at = from + r * from_ld + c;
      const auto a = hn::Mul(scale, hn::LoadU(d, at)), b = hn::Mul(scale, hn::LoadU(d, at + from_ld));
      const auto e = hn::Mul(scale, hn::LoadU(d, at + 2 * from_ld)), f = hn::Mul(scale, hn::LoadU(d, at + 3 * from_ld));
      const auto ab_low = hn::BitCast(dd, hn::InterleaveLower(d, a, b));
      const auto ab_high = hn::BitCast(dd, hn::InterleaveUpper(d, a, b));
      const auto ef_low = hn::BitCast(dd, hn::InterleaveLower(d, e, f));
      const auto ef_high = hn::BitCast(dd, hn::InterleaveUpper(d, e, f));
      float* target = to + c * to_ld + r;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, ab_low, ef_low)), d, target);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, ab_low, ef_low)), d, target + to_ld);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, ab_high, ef_high)), d, target + 2 * to_ld);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, ab_high, ef_high)), d, target + 3 * to_ld);
    }
    for (; c < columns; ++c)
      for (std::size_t i = r; i < r + 4; ++i) to[c * to_ld + i] = factor * from[i * from_ld + c];
  }
#endif
  for (; r < rows; ++r)
    for (std::size_t c = 0; c < columns; ++c) to[c * to_ld + r] = factor * from[r * from_ld + c];
}

// Whether rows hold neither NaN nor infinities: 0 * x is 0 for finite x alone.
HWY_INLINE bool all_finite(const FloatRows& rows, std::size_t count, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  auto products = hn::Zero(d);
  float product = 0;
  for (std::size_t row = 0; row < count; ++row) {
    const float* from = rows.data + row * rows.ld;
    std::size_t at = 0;
    for (; at + lanes <= dim; at += lanes) products = hn::MulAdd(hn::LoadU(d, from + at), hn::Zero(d), products);
    for (; at < dim; ++at) product += 0.0F * from[at];
  }
  return product == 0 && hn::AllTrue(d, hn::Eq(products, hn::Zero(d)));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
