// One tile of keys against one panel of queries in each precision: scores, probabilities, and their product with v.
#if defined(ADAATTN_CPU_TILE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_TILE_PRODUCTS_INL_H_
#undef ADAATTN_CPU_TILE_PRODUCTS_INL_H_
#else
#define ADAATTN_CPU_TILE_PRODUCTS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/online_softmax-inl.h"
#include "cpu/quantized.h"
#include "cpu/simd/dot-inl.h"
#include "cpu/simd/exp2-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// A panel's queries, times the softmax's scale, in the layouts of the products; each [..][kPanelLanes].
struct PanelQueries {
  std::int32_t* q8;    // [D in fours], 4 x s8 a lane
  std::int32_t* q16;   // [D in twos], 2 x bfloat16 a lane
  std::int32_t* bias;  // [1], -128 * sum of q8: the keys' bytes are 128 more than their values
  float* q8_scale;     // [1]
  float* offset;       // [1], q . (what the keys' copies were taken less of)
};

HWY_INLINE std::size_t fours(std::size_t count) { return (count + 3) / 4; }
HWY_INLINE std::size_t twos(std::size_t count) { return (count + 1) / 2; }

// One scale a lane. to [fours(rows)][kPanelLanes], from [rows][kPanelLanes].
inline HWY_NOINLINE void quantize_queries(const float* from, std::size_t rows, std::int32_t* to, float* scale,
                                          std::int32_t* bias) {
  const FloatTag d;
  const IntTag di;
  for (std::size_t lane = 0; lane < kPanelLanes; lane += kVectorLanes) {
    FloatVector largest = hn::Set(d, 1e-30F);
    for (std::size_t row = 0; row < rows; ++row)
      largest = hn::Max(largest, hn::Abs(hn::LoadU(d, from + row * kPanelLanes + lane)));
    const FloatVector inverse = hn::Div(hn::Set(d, 127.0F), largest);
    hn::StoreU(hn::Div(largest, hn::Set(d, 127.0F)), d, scale + lane);
    IntVector sum = hn::Zero(di);
    const auto value = [&](std::size_t row) HWY_ATTR {
      if (row >= rows) return hn::Zero(di);
      return hn::NearestInt(hn::Mul(hn::LoadU(d, from + row * kPanelLanes + lane), inverse));
    };
    for (std::size_t row = 0; row < rows; row += 4) {
      const IntVector a = value(row), b = value(row + 1), c = value(row + 2), e = value(row + 3);
      sum = hn::Add(sum, hn::Add(hn::Add(a, b), hn::Add(c, e)));
      hn::StoreU(pack_bytes(a, b, c, e), di, to + row / 4 * kPanelLanes + lane);
    }
    hn::StoreU(hn::Neg(hn::ShiftLeft<7>(sum)), di, bias + lane);
  }
}

inline HWY_NOINLINE void queries_to_bfloat16(const float* from, std::size_t rows, std::int32_t* to) {
  const FloatTag d;
  const IntTag di;
  for (std::size_t lane = 0; lane < kPanelLanes; lane += kVectorLanes)
    for (std::size_t row = 0; row < rows; row += 2) {
      const FloatVector second = row + 1 < rows ? hn::LoadU(d, from + (row + 1) * kPanelLanes + lane) : hn::Zero(d);
      hn::StoreU(pack_bfloat16(hn::LoadU(d, from + row * kPanelLanes + lane), second), di,
                 to + row / 2 * kPanelLanes + lane);
    }
}

struct IntPair {
  IntVector low, high;
};
HWY_INLINE IntPair load_int_pair(const std::int32_t* from) {
  const IntTag d;
  return {hn::LoadU(d, from), hn::LoadU(d, from + kVectorLanes)};
}

// Epilogue: integer dot products to scores, which are stored; the largest of each lane is kept.
struct StoreInt8Scores {
  StoreScores store;
  IntPair bias;
  Pair scale, offset;
  const float* key_scale;
  HWY_INLINE IntVector start_low() const { return bias.low; }
  HWY_INLINE IntVector start_high() const { return bias.high; }
  HWY_INLINE StoreInt8Scores at(std::size_t row) const { return {store.at(row), bias, scale, offset, key_scale + row}; }
  HWY_INLINE void operator()(std::size_t row, IntVector low, IntVector high) const {
    const FloatTag d;
    const FloatVector key = hn::Set(d, key_scale[row]);
    store(row, hn::MulAdd(hn::Mul(hn::ConvertTo(d, low), key), scale.low, offset.low),
          hn::MulAdd(hn::Mul(hn::ConvertTo(d, high), key), scale.high, offset.high));
  }
};

struct StoreBFloat16Scores {
  StoreScores store;
  Pair offset;
  HWY_INLINE FloatVector start_low() const { return offset.low; }
  HWY_INLINE FloatVector start_high() const { return offset.high; }
  HWY_INLINE StoreBFloat16Scores at(std::size_t row) const { return {store.at(row), offset}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const { store(row, low, high); }
};

// scores [keys][kPanelLanes] of keys from `first` on; returns the largest of each lane.
template <bool kNative>
HWY_NOINLINE Pair int8_scores(const Quantized& copy, std::size_t first, std::size_t keys, std::size_t dim,
                              const PanelQueries& queries, float* scores) {
  const FloatVector lowest = hn::Set(FloatTag(), kNegativeInfinity);
  Pair top = {lowest, lowest};
  StoreInt8Scores epilogue{{scores, &top},
                           load_int_pair(queries.bias),
                           load_pair(queries.q8_scale),
                           load_pair(queries.offset),
                           copy.k8_scale + first};
  const Groups k = {reinterpret_cast<const std::int32_t*>(copy.k8) + first * fours(dim), fours(dim), 1};
  panel_dots<UnsignedRows<kNative>>(keys, k, queries.q8, fours(dim), epilogue);
  return top;
}

template <bool kNative>
HWY_NOINLINE Pair bfloat16_scores(const Quantized& copy, std::size_t first, std::size_t keys, std::size_t dim,
                                  const PanelQueries& queries, float* scores) {
  const FloatVector lowest = hn::Set(FloatTag(), kNegativeInfinity);
  Pair top = {lowest, lowest};
  StoreBFloat16Scores epilogue{{scores, &top}, load_pair(queries.offset)};
  const Groups k = {reinterpret_cast<const std::int32_t*>(copy.k16) + first * twos(dim), twos(dim), 1};
  panel_dots<BFloat16Rows<kNative>>(keys, k, queries.q16, twos(dim), epilogue);
  return top;
}

// Where a tile's probabilities go: as they are, as pairs of bfloat16, or as four bytes.
struct KeepFloat {
  static constexpr int kDegree = 5;
  float* to;
  HWY_INLINE void four(std::size_t key, std::size_t count, const Pair* p) const {
    for (std::size_t i = 0; i < count; ++i) store_pair(p[i], to + (key + i) * kPanelLanes);
  }
};
struct KeepBFloat16 {
  static constexpr int kDegree = 4;
  std::int32_t* to;
  HWY_INLINE void four(std::size_t key, std::size_t, const Pair* p) const {
    const IntTag d;
    std::int32_t* at = to + key / 2 * kPanelLanes;
    for (std::size_t i = 0; i < 4; i += 2, at += kPanelLanes) {
      hn::StoreU(pack_bfloat16(p[i].low, p[i + 1].low), d, at);
      hn::StoreU(pack_bfloat16(p[i].high, p[i + 1].high), d, at + kVectorLanes);
    }
  }
};
struct KeepBytes {  // p in 0..255
  static constexpr int kDegree = 3;
  std::int32_t* to;
  HWY_INLINE void four(std::size_t key, std::size_t, const Pair* p) const {
    const IntTag d;
    std::int32_t* at = to + key / 4 * kPanelLanes;
    const auto byte = [](FloatVector x) HWY_ATTR { return hn::NearestInt(x); };
    hn::StoreU(pack_bytes(byte(p[0].low), byte(p[1].low), byte(p[2].low), byte(p[3].low)), d, at);
    hn::StoreU(pack_bytes(byte(p[0].high), byte(p[1].high), byte(p[2].high), byte(p[3].high)), d, at + kVectorLanes);
  }
};

// p = 2^(score * log2(e) - reference) of a tile, handed to keep; returns the sums of p. Keys up to a multiple of 4
// come as 0. kMasked: a score of -inf gives exactly 0. Where moment is not null it receives the sums of p * log2(p).
template <bool kMasked, class Keep>
HWY_NOINLINE Pair tile_mass(const float* scores, std::size_t keys, Pair reference, const Keep& keep, Pair* moment) {
  const FloatTag d;
  const FloatVector log2e = hn::Set(d, kLog2E), hidden = hn::Set(d, kNegativeInfinity), none = hn::Zero(d);
  Pair sums[4] = {{none, none}, {none, none}, {none, none}, {none, none}}, moments = {none, none};
  const auto one = [&](FloatVector score, FloatVector ref, FloatVector& sum, FloatVector& m) HWY_ATTR {
    const FloatVector x = hn::MulSub(score, log2e, ref);
    FloatVector p = exp2_of_degree<Keep::kDegree>(x);
    if constexpr (kMasked) p = hn::IfThenZeroElse(hn::Eq(score, hidden), p);
    sum = hn::Add(sum, p);
    if (moment != nullptr)  // a hidden score is -inf, and 0 * -inf is not 0
      m = hn::Add(m, hn::IfThenZeroElse(hn::Eq(p, hn::Zero(FloatTag())), hn::Mul(p, x)));
    return p;
  };
  for (std::size_t key = 0; key < keys; key += 4) {
    const std::size_t count = std::min<std::size_t>(4, keys - key);
    Pair p[4];
    for (std::size_t i = 0; i < 4; ++i) {
      if (i >= count) {
        p[i] = {none, none};
        continue;
      }
      const Pair score = load_pair(scores + (key + i) * kPanelLanes);
      p[i] = {one(score.low, reference.low, sums[i].low, moments.low),
              one(score.high, reference.high, sums[i].high, moments.high)};
    }
    keep.four(key, count, p);
  }
  if (moment != nullptr) *moment = moments;
  return {hn::Add(hn::Add(sums[0].low, sums[1].low), hn::Add(sums[2].low, sums[3].low)),
          hn::Add(hn::Add(sums[0].high, sums[1].high), hn::Add(sums[2].high, sums[3].high))};
}

// Epilogue of p v in int8: out += sum * p's scale (per lane) * v's scale (per channel).
struct AddInt8Values {
  float* out;
  const float* value_scale;
  Pair scale;
  HWY_INLINE IntVector start_low() const { return hn::Zero(IntTag()); }
  HWY_INLINE IntVector start_high() const { return hn::Zero(IntTag()); }
  HWY_INLINE AddInt8Values at(std::size_t row) const { return {out + row * kPanelLanes, value_scale + row, scale}; }
  HWY_INLINE void operator()(std::size_t row, IntVector low, IntVector high) const {
    const FloatTag d;
    float* at = out + row * kPanelLanes;
    const FloatVector value = hn::Set(d, value_scale[row]);
    const Pair old = load_pair(at);
    store_pair({hn::MulAdd(hn::Mul(hn::ConvertTo(d, low), scale.low), value, old.low),
                hn::MulAdd(hn::Mul(hn::ConvertTo(d, high), scale.high), value, old.high)},
               at);
  }
};

struct AddBFloat16Values {
  float* out;
  HWY_INLINE FloatVector start_low() const { return hn::Zero(FloatTag()); }
  HWY_INLINE FloatVector start_high() const { return hn::Zero(FloatTag()); }
  HWY_INLINE AddBFloat16Values at(std::size_t row) const { return {out + row * kPanelLanes}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const {
    float* at = out + row * kPanelLanes;
    const Pair old = load_pair(at);
    store_pair({hn::Add(old.low, low), hn::Add(old.high, high)}, at);
  }
};

// out [Dv][kPanelLanes] += p (v - mean of v) / p's scale, p four bytes a lane.
template <bool kNative>
HWY_NOINLINE void add_int8_values(const Quantized& copy, std::size_t first, std::size_t keys, std::size_t dv,
                                  const std::int32_t* p, Pair p_scale, float* out) {
  AddInt8Values epilogue{out, copy.v8_scale + first / static_cast<std::size_t>(kClassTile) * dv, p_scale};
  const Groups v = {reinterpret_cast<const std::int32_t*>(copy.v8 + first * dv), 1, dv};
  panel_dots<SignedRows<kNative>>(dv, v, p, fours(keys), epilogue);
}

template <bool kNative>
HWY_NOINLINE void add_bfloat16_values(const Quantized& copy, std::size_t first, std::size_t keys, std::size_t dv,
                                      const std::int32_t* p, float* out) {
  AddBFloat16Values epilogue{out};
  const Groups v = {reinterpret_cast<const std::int32_t*>(copy.v16 + first * dv), 1, dv};
  // p comes in fours: the last pair may be of zeros.
  panel_dots<BFloat16Rows<kNative>>(dv, v, p, twos(keys), epilogue);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
