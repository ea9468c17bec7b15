// What the exact and the tiled backward pass share: probabilities from scores, and products that add up.
#if defined(ADAATTN_CPU_GRADIENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_GRADIENT_INL_H_
#undef ADAATTN_CPU_GRADIENT_INL_H_
#else
#define ADAATTN_CPU_GRADIENT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>

#include "cpu/online_softmax-inl.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// dS = P (dP - delta), straight from the registers that hold dP.
struct StoreScoreGradient {
  const float* p;
  float* ds;
  std::size_t ld;
  Pair delta;
  HWY_INLINE StoreScoreGradient at(std::size_t row) const { return {p + row * ld, ds + row * ld, ld, delta}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const {
    const Pair probability = load_pair(p + row * ld);
    store_pair(
        {hn::Mul(probability.low, hn::Sub(low, delta.low)), hn::Mul(probability.high, hn::Sub(high, delta.high))},
        ds + row * ld);
  }
};

// p[key][lane] = 2^(score * log2(e) - reference); exactly 0 where a masked score is -inf.
template <bool kMasked>
HWY_INLINE void recompute_probabilities(const float* scores, std::size_t keys, Pair reference, float* p,
                                        std::size_t ld) {
  const FloatTag d;
  const FloatVector log2e = hn::Set(d, kLog2E), hidden = hn::Set(d, kNegativeInfinity);
  for (std::size_t key = 0; key < keys; ++key) {
    const Pair score = load_pair(scores + key * kPanelLanes);
    Pair value = {exp2_near_zero(hn::MulSub(score.low, log2e, reference.low)),
                  exp2_near_zero(hn::MulSub(score.high, log2e, reference.high))};
    if constexpr (kMasked)
      value = {hn::IfThenZeroElse(hn::Eq(score.low, hidden), value.low),
               hn::IfThenZeroElse(hn::Eq(score.high, hidden), value.high)};
    store_pair(value, p + key * ld);
  }
}

// C[rows][width] += A B, where B is [depth][width].
template <ALayout kLayout>
HWY_INLINE void add_product(std::size_t rows, const float* a, std::size_t lda, const FloatRows& b, std::size_t depth,
                            float* c, std::size_t width) {
  for (std::size_t lane = 0; lane < width; lane += kPanelLanes) {
    StoreRows<true> add{c + lane, width};
    panel_gemm<kLayout>(rows, a, lda, b.data + lane, b.ld, depth, add);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
