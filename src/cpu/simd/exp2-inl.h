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

// Relative error below 1.4e-7 for -126 <= x <= 127: 7.5e-8 of the polynomial, the rest rounding. Below -126 the result
// stays at 2^-126, which no float32 sum with a term near 1 can see. NaN gives NaN.
template <class V>
HWY_INLINE V exp2_near_zero(V x) {
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
  // Minimax polynomial of 2^r for the relative error (Remez exchange), degree 5.
  V p = hn::MulAdd(hn::Set(d, 0.00132764721678f), r, hn::Set(d, 0.00967554133102f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.0555071327288f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.24022119724f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.693146967065f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.00000007165f));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
