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

// What the terms of some rows have in common.
struct TermRange {
  FloatVector least, most, odd;  // odd: not 0 in lanes that met NaN

  HWY_INLINE void add(FloatVector term) {
    const FloatTag d;
    least = hn::Min(least, term);
    most = hn::Max(most, term);
    odd = hn::IfThenElse(hn::Eq(term, term), odd, hn::Set(d, 1.0F));
  }
};

// One row of terms, keys consecutive; entries up to the next multiple of the vector repeat the last one.
HWY_INLINE void load_mask_row(const MaskRow& from, std::size_t keys, float* HWY_RESTRICT to, TermRange& range) {
  const FloatTag d;
  const IntTag di;
  const hn::Rebind<std::uint8_t, FloatTag> du8;
  const FloatVector hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
  const FloatVector lowest = hn::Set(d, kLowestTerm);
  std::size_t key = 0;
  if (from.dtype == ADAATTN_BOOL && from.key_stride == 1) {
    const auto* bytes = static_cast<const std::uint8_t*>(from.data);
    for (; key + kVectorLanes <= keys; key += kVectorLanes) {
      const auto shown = hn::PromoteTo(di, hn::LoadU(du8, bytes + key));
      const FloatVector term = hn::IfThenElseZero(hn::RebindMask(d, hn::Eq(shown, hn::Zero(di))), hidden);
      hn::StoreU(term, d, to + key);
      range.add(term);
    }
  } else if (from.dtype == ADAATTN_FLOAT32 && from.key_stride == 1) {
    const auto* values = static_cast<const float*>(from.data);
    for (; key + kVectorLanes <= keys; key += kVectorLanes) {
      FloatVector term = hn::LoadU(d, values + key);
      term = hn::IfThenElse(hn::And(hn::Lt(term, lowest), hn::Gt(term, hidden)), lowest, term);
      hn::StoreU(term, d, to + key);
      range.add(term);
    }
  }
  if (key == keys) return;
  const std::size_t rest = key;
  for (; key < keys; ++key) to[key] = mask_term(from, static_cast<std::int64_t>(key));
  for (; key % kVectorLanes != 0; ++key) to[key] = to[keys - 1];
  for (std::size_t at = rest; at < key; at += kVectorLanes) range.add(hn::LoadU(d, to + at));
}

enum class MaskEffect { kNone, kSome, kHidesAll };

// terms[key][lane] for the keys [key_begin, key_begin + keys); row_terms is scratch of kPanelLanes rows of keys rounded
// up to a whole vector. Where the mask has no effect, or hides every key, terms are not written.
HWY_INLINE MaskEffect fill_mask_terms(const adaattn_tensor& mask, const PanelRows& rows, std::int64_t key_begin,
                                      std::size_t keys, float* row_terms, float* terms) {
  const FloatTag d;
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  const bool same_for_all = mask.shape[2] == 1 && (mask.shape[1] == 1 || rows.one_head());
  const std::size_t count = same_for_all ? 1 : static_cast<std::size_t>(rows.count);
  const std::size_t ld = (keys + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
  TermRange range = {hn::Set(d, -kHidden), hn::Set(d, kHidden), hn::Zero(d)};
  for (std::size_t lane = 0; lane < count; ++lane) {
    const std::int64_t row = rows.first + static_cast<std::int64_t>(lane);
    load_mask_row(mask_row(mask, rows.b, rows.head_of(row), rows.query_of(row), key_begin), keys, row_terms + lane * ld,
                  range);
  }
  const float least = hn::GetLane(hn::MinOfLanes(d, range.least)), most = hn::GetLane(hn::MaxOfLanes(d, range.most));
  const bool ordinary = hn::AllTrue(d, hn::Eq(range.odd, hn::Zero(d)));
  if (ordinary && most == kHidden) return MaskEffect::kHidesAll;
  if (ordinary && least == 0 && most == 0) return MaskEffect::kNone;
  if (same_for_all) {
    for (std::size_t key = 0; key < keys; ++key)
      for (std::size_t lane = 0; lane < kPanelLanes; lane += kVectorLanes)
        hn::StoreU(hn::Set(d, row_terms[key]), d, terms + key * kPanelLanes + lane);
  } else {
    transpose(row_terms, ld, count, keys, 1.0F, terms, kPanelLanes);
  }
  return MaskEffect::kSome;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
