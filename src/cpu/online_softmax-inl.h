// The online softmax of one panel of queries (Milakov and Gimelshein, arXiv 1805.02867), queries along the lanes.
#if defined(ADAATTN_CPU_ONLINE_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_ONLINE_SOFTMAX_INL_H_
#undef ADAATTN_CPU_ONLINE_SOFTMAX_INL_H_
#else
#define ADAATTN_CPU_ONLINE_SOFTMAX_INL_H_
#endif

#include <hwy/highway.h>

#include <limits>

#include "cpu/panel_mask.h"
#include "cpu/simd/exp2-inl.h"
#include "cpu/simd/micro_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Running values of a panel's rows, each [kPanelLanes]. Probabilities are kept relative to 2^reference; the reference
// follows the largest score, but only when that has grown by more than kSlack, so that sums are seldom rescaled.
struct RowState {
  static constexpr std::size_t kValues = 5;
  static constexpr float kSlack = 8;

  float* reference;     // in units of log2
  float* top;           // largest score so far, natural units
  float* sum;           // of probabilities
  float* compensation;  // of sum (Kahan)
  float* moment;        // of p * log2(p), for the entropy

  explicit RowState(float* base)
      : reference(base),
        top(base + kPanelLanes),
        sum(base + 2 * kPanelLanes),
        compensation(base + 3 * kPanelLanes),
        moment(base + 4 * kPanelLanes) {}

  void clear() const {
    for (std::size_t lane = 0; lane < kPanelLanes; ++lane) {
      reference[lane] = std::numeric_limits<float>::lowest();
      top[lane] = kNegativeInfinity;
      sum[lane] = compensation[lane] = moment[lane] = 0;
    }
  }
};

struct Pair {
  FloatVector low, high;
};

HWY_INLINE Pair load_pair(const float* from) {
  const FloatTag d;
  return {hn::LoadU(d, from), hn::LoadU(d, from + kVectorLanes)};
}
HWY_INLINE void store_pair(Pair pair, float* to) {
  const FloatTag d;
  hn::StoreU(pair.low, d, to);
  hn::StoreU(pair.high, d, to + kVectorLanes);
}

// Epilogue of q k^T: stores the scores and keeps the largest of each lane.
struct StoreScores {
  float* scores;
  Pair* top;
  HWY_INLINE StoreScores at(std::size_t row) const { return {scores + row * kPanelLanes, top}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const {
    store_pair({low, high}, scores + row * kPanelLanes);
    top->low = hn::Max(top->low, low);
    top->high = hn::Max(top->high, high);
  }
};

// Epilogue of p v: out += row, with Kahan's compensation, so that the error does not grow with the number of tiles.
struct AddCompensated {
  float *out, *compensation;
  std::size_t ld = kPanelLanes;
  HWY_INLINE AddCompensated at(std::size_t row) const { return {out + row * ld, compensation + row * ld, ld}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const {
    add(row * ld, low);
    add(row * ld + kVectorLanes, high);
  }
  HWY_INLINE void add(std::size_t at, FloatVector value) const {
    const FloatTag d;
    const FloatVector old = hn::LoadU(d, out + at);
    const FloatVector term = hn::Sub(value, hn::LoadU(d, compensation + at));
    const FloatVector sum = hn::Add(old, term);
    const FloatVector lost = hn::Sub(hn::Sub(sum, old), term);  // NaN once the sum is infinite: no correction then
    hn::StoreU(hn::IfThenElseZero(hn::Eq(lost, lost), lost), d, compensation + at);
    hn::StoreU(sum, d, out + at);
  }
};

// Hides the keys that a lane does not see (score -inf), adds the mask's terms, and returns the largest scores anew.
// key_offset: the first key's place in the tile that bounds are relative to. terms may be null.
HWY_INLINE Pair mask_scores(float* scores, std::size_t keys, std::int32_t key_offset,
                            const LaneBounds<kPanelLanes>& bounds, const float* terms) {
  const FloatTag d;
  const IntTag di;
  const FloatVector hidden = hn::Set(d, kNegativeInfinity);
  Pair top = {hidden, hidden};
  for (std::size_t half = 0; half < 2; ++half) {
    const std::size_t lane = half * kVectorLanes;
    const auto sink_end = hn::LoadU(di, bounds.sink_end + lane), begin = hn::LoadU(di, bounds.begin + lane);
    const auto end = hn::LoadU(di, bounds.end + lane);
    FloatVector largest = hidden;
    for (std::size_t key = 0; key < keys; ++key) {
      const auto j = hn::Set(di, key_offset + static_cast<std::int32_t>(key));
      auto shown = hn::Or(hn::Lt(j, sink_end), hn::AndNot(hn::Lt(j, begin), hn::Lt(j, end)));
      float* at = scores + key * kPanelLanes + lane;
      FloatVector score = hn::LoadU(d, at);
      if (terms != nullptr) {
        const FloatVector term = hn::LoadU(d, terms + key * kPanelLanes + lane);
        shown = hn::AndNot(hn::RebindMask(di, hn::Eq(term, hidden)), shown);
        score = hn::Add(score, term);
      }
      score = hn::IfThenElse(hn::RebindMask(d, shown), score, hidden);
      hn::StoreU(score, d, at);
      largest = hn::Max(largest, score);
    }
    (half == 0 ? top.low : top.high) = largest;
  }
  return top;
}

// The new reference of a vector of rows, and the factor 2^(old - new) for what was summed under the old one.
HWY_INLINE FloatVector follow_reference(float* reference, float* largest, FloatVector tile_top, bool& moved) {
  const FloatTag d;
  hn::StoreU(hn::Max(hn::LoadU(d, largest), tile_top), d, largest);
  const FloatVector old = hn::LoadU(d, reference), wanted = hn::Mul(tile_top, hn::Set(d, kLog2E));
  const auto grown = hn::Gt(wanted, hn::Add(old, hn::Set(d, RowState::kSlack)));
  const FloatVector now = hn::IfThenElse(grown, wanted, old);
  hn::StoreU(now, d, reference);
  moved = moved || !hn::AllFalse(d, grown);
  return exp2_near_zero(hn::Sub(old, now));
}

// Scores to probabilities, in place; adds them to sum. kMasked: scores of -inf become exactly 0. kMoment: adds
// p * log2(p) to moment.
template <bool kMasked, bool kMoment>
HWY_INLINE void exponentiate(float* scores, std::size_t keys, const RowState& state) {
  const FloatTag d;
  const FloatVector log2e = hn::Set(d, kLog2E), hidden = hn::Set(d, kNegativeInfinity);
  const Pair reference = load_pair(state.reference);
  // Four partial sums a lane keep the additions apart and the rounding of a tile's sum small.
  Pair sums[4] = {
      {hn::Zero(d), hn::Zero(d)}, {hn::Zero(d), hn::Zero(d)}, {hn::Zero(d), hn::Zero(d)}, {hn::Zero(d), hn::Zero(d)}};
  Pair moments = {hn::Zero(d), hn::Zero(d)};
  const auto one = [&](float* at, FloatVector ref, FloatVector& sum, FloatVector& moment) HWY_ATTR {
    const FloatVector score = hn::LoadU(d, at);
    const FloatVector x = hn::MulSub(score, log2e, ref);
    FloatVector p = exp2_near_zero(x);
    if constexpr (kMasked) p = hn::IfThenZeroElse(hn::Eq(score, hidden), p);
    hn::StoreU(p, d, at);
    sum = hn::Add(sum, p);
    if constexpr (kMoment) {
      FloatVector term = hn::Mul(p, x);
      if constexpr (kMasked) term = hn::IfThenZeroElse(hn::Eq(score, hidden), term);
      moment = hn::Add(moment, term);
    }
  };
  std::size_t key = 0;
  for (; key + 4 <= keys; key += 4)
    for (std::size_t i = 0; i < 4; ++i) {
      one(scores + (key + i) * kPanelLanes, reference.low, sums[i].low, moments.low);
      one(scores + (key + i) * kPanelLanes + kVectorLanes, reference.high, sums[i].high, moments.high);
    }
  for (; key < keys; ++key) {
    one(scores + key * kPanelLanes, reference.low, sums[0].low, moments.low);
    one(scores + key * kPanelLanes + kVectorLanes, reference.high, sums[0].high, moments.high);
  }
  const AddCompensated add{state.sum, state.compensation};
  add.add(0, hn::Add(hn::Add(sums[0].low, sums[1].low), hn::Add(sums[2].low, sums[3].low)));
  add.add(kVectorLanes, hn::Add(hn::Add(sums[0].high, sums[1].high), hn::Add(sums[2].high, sums[3].high)));
  if constexpr (kMoment) {
    const Pair old = load_pair(state.moment);
    store_pair({hn::Add(old.low, moments.low), hn::Add(old.high, moments.high)}, state.moment);
  }
}

// Multiplies every row of a [rows][kPanelLanes] array by the lanes of factor.
HWY_INLINE void scale_rows(float* data, std::size_t rows, Pair factor) {
  for (std::size_t row = 0; row < rows; ++row) {
    const Pair value = load_pair(data + row * kPanelLanes);
    store_pair({hn::Mul(value.low, factor.low), hn::Mul(value.high, factor.high)}, data + row * kPanelLanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
