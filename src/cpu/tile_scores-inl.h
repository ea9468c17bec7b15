// Scores of one tile of keys against one panel of queries in each precision: the same for outputs and for gradients.
#if defined(ADAATTN_CPU_TILE_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_TILE_SCORES_INL_H_
#undef ADAATTN_CPU_TILE_SCORES_INL_H_
#else
#define ADAATTN_CPU_TILE_SCORES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/emulated.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/quantized.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/tile_products-inl.h"
#include "plan/head_plan.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// A tile's keys.
struct ScoredKeys {
  std::size_t count, dim;
  FloatRows rows;         // as they are, for float32 and the emulated precisions
  const float* mean;      // [D], what the copies and float8 are taken less of
  const Quantized& copy;  // for int8 and bfloat16,
  std::size_t first;      // where the tile starts in it
};

// Where the emulated precisions put what they rounded.
struct EmulatedScratch {
  float *k, *q;  // [kClassTile][D], [D][kPanelLanes]
};

// A panel's queries, q [D][kPanelLanes] times the softmax's scale, in the precisions that are wanted.
inline void prepare_queries(Copies wanted, const float* q, std::size_t dim, const float* key_mean,
                            const PanelQueries& to) {
  if (wanted.int8) quantize_queries(q, dim, to.q8, to.q8_scale, to.bias);
  if (wanted.bfloat16) queries_to_bfloat16(q, dim, to.q16);
  StoreRows<false> store{to.offset, kPanelLanes};
  panel_gemm<ALayout::kRowMajor>(1, key_mean, dim, q, kPanelLanes, dim, store);
}

// Keys and queries rounded in scratch; scores as of the keys themselves.
inline HWY_NOINLINE Pair emulated_scores(std::int32_t precision, const ScoredKeys& keys, const float* q,
                                         const PanelQueries& queries, const EmulatedScratch& scratch, float* scores) {
  const FloatTag d;
  const bool centred = is_8_bit(precision);
  for (std::size_t key = 0; key < keys.count; ++key) {
    float* to = scratch.k + key * keys.dim;
    for (std::size_t c = 0; c < keys.dim; ++c)
      to[c] = keys.rows.data[key * keys.rows.ld + c] - (centred ? keys.mean[c] : 0);
    round_values(precision, to, keys.dim, 1);
  }
  std::copy_n(q, keys.dim * kPanelLanes, scratch.q);
  for (std::size_t lane = 0; lane < kPanelLanes; ++lane)
    round_values(precision, scratch.q + lane, keys.dim, kPanelLanes);
  const FloatVector lowest = hn::Set(d, kNegativeInfinity);
  Pair top = {lowest, lowest};
  StoreScores store{scores, &top};
  panel_gemm<ALayout::kRowMajor>(keys.count, scratch.k, keys.dim, scratch.q, kPanelLanes, keys.dim, store);
  if (!centred) return top;
  const Pair offset = load_pair(queries.offset);
  for (std::size_t key = 0; key < keys.count; ++key) {
    const Pair score = load_pair(scores + key * kPanelLanes);
    store_pair({hn::Add(score.low, offset.low), hn::Add(score.high, offset.high)}, scores + key * kPanelLanes);
  }
  return {hn::Add(top.low, offset.low), hn::Add(top.high, offset.high)};
}

// scores [keys][kPanelLanes]; returns the largest of each lane.
HWY_INLINE Pair tile_scores(std::int32_t precision, const ScoredKeys& keys, const float* q, const PanelQueries& queries,
                            const EmulatedScratch& scratch, float* scores) {
  if (is_emulated(precision)) return emulated_scores(precision, keys, q, queries, scratch, scores);
  if (precision == ADAATTN_PRECISION_INT8)
    return native_dots().int8 ? int8_scores<true>(keys.copy, keys.first, keys.count, keys.dim, queries, scores)
                              : int8_scores<false>(keys.copy, keys.first, keys.count, keys.dim, queries, scores);
  if (precision == ADAATTN_PRECISION_BFLOAT16)
    return native_dots().bfloat16
               ? bfloat16_scores<true>(keys.copy, keys.first, keys.count, keys.dim, queries, scores)
               : bfloat16_scores<false>(keys.copy, keys.first, keys.count, keys.dim, queries, scores);
  const FloatVector lowest = hn::Set(FloatTag(), kNegativeInfinity);
  Pair top = {lowest, lowest};
  StoreScores store{scores, &top};
  panel_gemm<ALayout::kRowMajor>(keys.count, keys.rows.data, keys.rows.ld, q, kPanelLanes, keys.dim, store);
  return top;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
