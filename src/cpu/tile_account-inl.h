// What summaries and dropped tiles mean to a panel's rows: their shares of the softmax, and the error that they make.
//
// With S the sum of a row's exponentials as computed and o = out / S, for each summarised tile d_b = sum_j p_j (v_j -
// mean v) and for each dropped one m_b its mass, M their sum, the exact row is off by
//   o* - o = (sum of d_b over summarised tiles + sum of m_b (mean v_b - o) + rest) / (S + M),
// where rest, how v strays from its mean in dropped tiles, is left out, as is rounding. d_b is computed, which is the
// product that the summary saves; m_b is estimated from the screen: the exponentials of its scores, times the mean
// exponential of what it does not see.
#if defined(ADAATTN_CPU_TILE_ACCOUNT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_TILE_ACCOUNT_INL_H_
#undef ADAATTN_CPU_TILE_ACCOUNT_INL_H_
#else
#define ADAATTN_CPU_TILE_ACCOUNT_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/panel-inl.h"
#include "cpu/screen_panel-inl.h"
#include "cpu/tile_products-inl.h"
#include "cpu/tiled.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// Of one panel, relative to its rows' references.
struct PanelAccount {
  float* strays;  // [Dv][lanes], sums of d_b and of m_b mean v_b
  float* pooled;  // [lanes], mass of pooled tiles
};

// Whether the panel's part of the head's error is wanted, too.
HWY_INLINE bool accounts_error(const ForwardPlan& plan, std::int64_t first_row) {
  constexpr auto kLanes = static_cast<std::int64_t>(kPanelLanes);
  return asks_for_masses(*plan.args) && is_accounted(first_row / kLanes, (plan.args->q.shape[2] + kLanes - 1) / kLanes);
}

HWY_INLINE PanelAccount account_of(const TiledScratch& scratch, std::size_t panel, std::size_t dv) {
  return {scratch.strays + panel * dv * kPanelLanes, scratch.pooled_mass + panel * kPanelLanes};
}

HWY_INLINE void begin_account(const PanelAccount& account, std::size_t dv) {
  std::fill_n(account.strays, dv * kPanelLanes, 0.0F);
  std::fill_n(account.pooled, kPanelLanes, 0.0F);
}

HWY_INLINE void rescale_account(const PanelAccount& account, std::size_t dv, Pair factor) {
  scale_rows(account.strays, dv, factor);
  scale_rows(account.pooled, 1, factor);
}

// Epilogue: out += row.
struct AddRows {
  float* out;
  HWY_INLINE AddRows at(std::size_t row) const { return {out + row * kPanelLanes}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const {
    float* at = out + row * kPanelLanes;
    const Pair old = load_pair(at);
    store_pair({hn::Add(old.low, low), hn::Add(old.high, high)}, at);
  }
};

// Of a tile that has been summarised: p [count][lanes]. Its mass times its mean is taken off in the end.
HWY_INLINE void add_summarised_values(const PanelAccount& account, const float* v, std::size_t ld, std::size_t dv,
                                      const float* p, std::size_t count) {
  AddRows add{account.strays};
  panel_gemm<ALayout::kTransposed>(dv, v, ld, p, kPanelLanes, count, add);
}

// Epilogue of screened scores in int8.
struct StoreScreened {
  float* scores;
  IntPair bias;
  Pair scale;
  HWY_INLINE IntVector start_low() const { return bias.low; }
  HWY_INLINE IntVector start_high() const { return bias.high; }
  HWY_INLINE StoreScreened at(std::size_t row) const { return {scores + row * kPanelLanes, bias, scale}; }
  HWY_INLINE void operator()(std::size_t row, IntVector low, IntVector high) const {
    const FloatTag d;
    store_pair({hn::Mul(hn::ConvertTo(d, low), scale.low), hn::Mul(hn::ConvertTo(d, high), scale.high)},
               scores + row * kPanelLanes);
  }
};

template <bool kNative>
HWY_NOINLINE void int8_screened(const KeyHead& keys, std::size_t tile, std::size_t count,
                                const ScreenedQueries& queries, float* scores) {
  const FloatVector key_scale = hn::Set(FloatTag(), keys.k8_scale[tile]);
  StoreScreened store{
      scores, queries.bias, {hn::Mul(queries.scale.low, key_scale), hn::Mul(queries.scale.high, key_scale)}};
  const std::size_t groups = static_cast<std::size_t>(*keys.rank) / 4, first = tile * kClassTile;
  const Groups k = {reinterpret_cast<const std::int32_t*>(keys.k8) + first * groups, groups, 1};
  panel_dots<UnsignedRows<kNative>>(count, k, queries.q8, groups, store);
}

// Scores by the screen of a whole tile, of keys less their mean. [kClassTile][lanes]
HWY_INLINE void screened_scores(const KeyHead& keys, std::size_t tile, const ScreenedQueries& queries, float* scores) {
  const auto count = static_cast<std::size_t>(kClassTile), rank = static_cast<std::size_t>(*keys.rank);
  if (keys.k8 != nullptr)
    return native_dots().int8 ? int8_screened<true>(keys, tile, count, queries, scores)
                              : int8_screened<false>(keys, tile, count, queries, scores);
  const FloatVector lowest = hn::Set(FloatTag(), kNegativeInfinity);
  Pair top = {lowest, lowest};
  StoreScores store{scores, &top};
  panel_gemm<ALayout::kRowMajor>(count, keys.k + tile * count * rank, rank, queries.q, kPanelLanes, rank, store);
}

// The estimated masses of dropped tiles, one after the other, relative to the rows' references.
class DroppedMasses {
 public:
  DroppedMasses(const TiledScratch& scratch, const KeyHead& keys, const Panel& panel, std::size_t dim)
      : keys_(keys), queries_(screen_queries(scratch, keys, panel, dim)) {
    const FloatTag d;
    Pair mean_score = {hn::Zero(d), hn::Zero(d)};
    for (std::size_t c = 0; c < dim; ++c) {
      const Pair q = load_pair(panel.q + c * kPanelLanes);
      const FloatVector mean = hn::Set(d, keys.mean[c]);
      mean_score = {hn::MulAdd(q.low, mean, mean_score.low), hn::MulAdd(q.high, mean, mean_score.high)};
    }
    // What the screen does not see of a score has the deviation u, and if it is normal the mean exponential e^(u^2 /
    // 2); held to what the tile was left out with.
    const auto unseen = [&](FloatVector u) HWY_ATTR {
      return hn::Min(hn::Mul(hn::Set(d, 0.5F), hn::Mul(u, u)), hn::Mul(hn::Set(d, kUnseenMargin), u));
    };
    const Pair reference = load_pair(panel.state.reference);
    const FloatVector log2e = hn::Set(d, kLog2E);
    store_pair({hn::NegMulAdd(hn::Add(mean_score.low, unseen(queries_.unseen.low)), log2e, reference.low),
                hn::NegMulAdd(hn::Add(mean_score.high, unseen(queries_.unseen.high)), log2e, reference.high)},
               reference_);
  }

  Pair operator()(std::size_t tile, float* scores) const {
    screened_scores(keys_, tile, queries_, scores);
    return tile_mass<false>(scores, static_cast<std::size_t>(kClassTile), load_pair(reference_), KeepFloat{scores},
                            nullptr);
  }

 private:
  const KeyHead& keys_;
  ScreenedQueries queries_;
  float reference_[kPanelLanes];  // less the mean key's score and what is added for what is not seen
};

// Weighted means of v over some tiles, in batches.
struct MeanSum {
  const KeyHead& keys;
  const BlockTiles& block;
  float *weights, *out;  // [kKeyTile][lanes], [Dv][lanes]
  std::size_t dv, width, count = 0;

  HWY_INLINE void add(std::size_t tile, Pair weight) {
    std::copy_n(keys.value_means + tile * width, width, block.scratch->values + count * width);
    store_pair(weight, weights + count * kPanelLanes);
    if (++count == kKeyTile) flush();
  }
  HWY_INLINE void flush() {
    if (count == 0) return;
    AddRows rows{out};
    panel_gemm<ALayout::kTransposed>(dv, block.scratch->values, width, weights, kPanelLanes, count, rows);
    count = 0;
  }
};

// Once the panel's sums are complete: writes the rows' shares and adds to the block's account.
inline HWY_NOINLINE void finish_account(const ForwardPlan& plan, const ForwardScratch& scratch, const Panel& panel,
                                        const KeyHead& keys, const BlockTiles& block, std::size_t index,
                                        Account& total) {
  const FloatTag d;
  const adaattn_forward_args& args = *plan.args;
  const auto dim = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  const PanelAccount account = account_of(*block.scratch, index, dv);
  const std::uint8_t* classes = block.classes(index);
  MeanSum means{keys, block, scratch.terms, account.strays, dv, padded_width(args.v.shape[3])};
  const bool with_error = accounts_error(plan, panel.rows.first);
  Pair summarised = load_pair(account.pooled), omitted = {hn::Zero(d), hn::Zero(d)};
  for (std::size_t at = 0; at < block.listed[index]; ++at) {  // 8-bit tiles are listed, too
    const auto tile = static_cast<std::size_t>(block.list(index)[at]);
    if (classes[tile] != ADAATTN_TILE_SUMMARISED && classes[tile] != ADAATTN_TILE_SUMMARISED_LOW) continue;
    const Pair mass = load_pair(block.masses(index) + at * kPanelLanes);
    summarised = {hn::Add(summarised.low, mass.low), hn::Add(summarised.high, mass.high)};
    if (with_error) means.add(tile, {hn::Neg(mass.low), hn::Neg(mass.high)});
  }
  if (std::find(classes, classes + block.tiles, std::uint8_t{ADAATTN_TILE_DROPPED}) != classes + block.tiles) {
    const DroppedMasses mass_of(*block.scratch, keys, panel, dim);
    for (std::size_t tile = 0; tile < block.tiles; ++tile) {
      if (classes[tile] != ADAATTN_TILE_DROPPED) continue;
      const Pair mass = mass_of(tile, scratch.scores);
      omitted = {hn::Add(omitted.low, mass.low), hn::Add(omitted.high, mass.high)};
      if (with_error) means.add(tile, mass);
    }
  }
  if (with_error) means.flush();
  float in_means[kPanelLanes], left_out[kPanelLanes];
  store_pair(summarised, in_means);
  store_pair(omitted, left_out);
  for (std::size_t lane = 0; lane < static_cast<std::size_t>(panel.rows.count); ++lane) {
    const double sum = panel.state.sum[lane], all = sum + left_out[lane];
    const bool nothing = sum == 0;  // sees no key
    const auto row = panel.rows.first + static_cast<std::int64_t>(lane);
    if (args.summarised_mass != nullptr)
      args.summarised_mass[row] = nothing ? 0.0F : static_cast<float>(in_means[lane] / all);
    if (args.omitted_mass != nullptr)
      args.omitted_mass[row] = nothing ? 0.0F : static_cast<float>(left_out[lane] / all);
    for (std::size_t c = 0; c < dv && with_error && !nothing; ++c) {
      const double out = panel.out[c * kPanelLanes + lane] / sum,
                   error = (account.strays[c * kPanelLanes + lane] - left_out[lane] * out) / all;
      total.error += error * error;
      total.norm += out * out;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
