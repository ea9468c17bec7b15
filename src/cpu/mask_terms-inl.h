// The mask's terms for one panel of queries: what is added to a score, -inf where the mask hides the key.
#if defined(ADAATTN_CPU_MASK_TERMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_MASK_TERMS_INL_H_
#undef ADAATTN_CPU_MASK_TERMS_INL_H_
#else
#define ADAATTN_CPU_MASK_TERMS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "common/tensor.h"
#include "cpu/mask_row.h"
#include "cpu/panel_mask.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// One row of terms, keys consecutive.
HWY_INLINE void load_mask_row(const MaskRow& from, std::size_t keys, float* HWY_RESTRICT to) {
  const FloatTag d;
  const IntTag di;
  const hn::Rebind<std::uint8_t, FloatTag> du8;
  std::size_t key = 0;
  if (from.dtype == ADAATTN_BOOL && from.key_stride == 1) {
    const auto* bytes = static_cast<const std::uint8_t*>(from.data);
    const auto hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
    for (; key + kVectorLanes <= keys; key += kVectorLanes) {
      const auto shown = hn::PromoteTo(di, hn::LoadU(du8, bytes + key));
      hn::StoreU(hn::IfThenElseZero(hn::RebindMask(d, hn::Eq(shown, hn::Zero(di))), hidden), d, to + key);
    }
  }
  for (; key < keys; ++key) to[key] = mask_term(from, static_cast<std::int64_t>(key));
}

enum class MaskEffect { kNone, kSome, kHidesAll };

// terms[key][lane] for the keys [key_begin, key_begin + keys); row_terms is scratch of [kPanelLanes][keys]. Where the
// mask has no effect, or hides every key, terms are not written.
HWY_INLINE MaskEffect fill_mask_terms(const adaattn_tensor& mask, const PanelRows& rows, std::int64_t key_begin,
                                      std::size_t keys, float* row_terms, float* terms) {
  const FloatTag d;
  const bool same_for_all = mask.shape[2] == 1 && (mask.shape[1] == 1 || rows.one_head());
  const std::size_t count = same_for_all ? 1 : static_cast<std::size_t>(rows.count);
  float least = std::numeric_limits<float>::infinity(), most = -least;
  bool ordinary = true;  // no NaN
  for (std::size_t lane = 0; lane < count; ++lane) {
    const std::int64_t row = rows.first + static_cast<std::int64_t>(lane);
    float* to = row_terms + lane * keys;
    load_mask_row(mask_row(mask, rows.b, rows.head_of(row), rows.query_of(row), key_begin), keys, to);
    for (std::size_t key = 0; key < keys; ++key) {
      least = std::min(least, to[key]);
      most = std::max(most, to[key]);
      ordinary &= to[key] == to[key];
    }
  }
  if (ordinary && most == -std::numeric_limits<float>::infinity()) return MaskEffect::kHidesAll;
  if (ordinary && least == 0 && most == 0) return MaskEffect::kNone;
  if (same_for_all) {
    for (std::size_t key = 0; key < keys; ++key)
      for (std::size_t lane = 0; lane < kPanelLanes; lane += kVectorLanes)
        hn::StoreU(hn::Set(d, row_terms[key]), d, terms + key * kPanelLanes + lane);
  } else {
    transpose(row_terms, keys, count, keys, 1.0F, terms, kPanelLanes);
  }
  return MaskEffect::kSome;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
