// 2^x of a vector of float32, for softmax: x is at most a small positive number.
#if defined(ADAATTN_CPU_SIMD_EXP2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_SIMD_EXP2_INL_H_
#undef ADAATTN_CPU_SIMD_EXP2_INL_H_
#else
#define ADAATTN_CPU_SIMD_EXP2_INL_H_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Minimax polynomials of 2^r over [-1/2, 1/2] for the relative error (Remez exchange), highest power first.
template <int kDegree>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<3> {  // 7.5e-5
  static constexpr float kTerms[] = {0.0551716690926F, 0.242611122224F, 0.693260985454F, 0.999928073535F};
};
template <>
struct Exp2Polynomial<4> {  // 2.6e-6
  static constexpr float kTerms[] = {0.00957010201463F, 0.0559178603063F, 0.24024744825F, 0.693121814743F,
                                     0.999999261447F};
};
template <>
struct Exp2Polynomial<5> {  // 7.5e-8, so that with rounding the whole stays below 1.4e-7
  static constexpr float kTerms[] = {0.00132764721678F, 0.00967554133102F, 0.0555071327288F,
                                     0.24022119724F,    0.693146967065F,   1.00000007165F};
};

// For -126 <= x <= 127, to the polynomial's error and float32's rounding. Below -126 the result stays at 2^-126, which
// no float32 sum with a term near 1 can see. NaN gives NaN.
template <int kDegree, class V>
HWY_INLINE V exp2_of_degree(V x) {
  const hn::DFromV<V> d;
  const hn::RebindToSigned<decltype(d)> di;
  const V lowest = hn::Set(d, -126.0f);
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  x = hn::IfThenElse(hn::Lt(x, lowest), lowest, x);
#else
  x = hn::Max(lowest, x);  // in this order NaN survives: x86 returns the second operand, NEON the NaN
#endif
  // Adding 1.5 * 2^23 rounds x to an integer that then stands in the low bits of the sum.
  const V magic = hn::Set(d, 12582912.0f);
  const V shifted = hn::Add(x, magic);
  const V r = hn::Sub(x, hn::Sub(shifted, magic));  // in [-1/2, 1/2]
  V p = hn::Set(d, Exp2Polynomial<kDegree>::kTerms[0]);
  for (int term = 1; term <= kDegree; ++term) p = hn::MulAdd(p, r, hn::Set(d, Exp2Polynomial<kDegree>::kTerms[term]));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
}

template <class V>
HWY_INLINE V exp2_near_zero(V x) {
  return exp2_of_degree<5>(x);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
