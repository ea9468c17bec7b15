#include "cpu/tile_costs.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/tile_costs.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>

#include "cpu/key_head.h"
#include "cpu/tile_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr std::size_t kTile = kClassTile, kSample = 128;  // channels that are timed

// Operands of a tile by a panel; what is in them does not matter to the time.
struct Operands {
  alignas(64) float k[kTile * kSample], q[kSample * kPanelLanes], scores[kTile * kPanelLanes];
  alignas(64) float out[kSample * kPanelLanes], compensation[kSample * kPanelLanes], scale[kTile];
  alignas(64) std::int32_t k_groups[kTile * kSample / 2], q_groups[kSample / 2 * kPanelLanes], p[kTile * kPanelLanes];
  alignas(64) float row[kPanelLanes];
  alignas(64) std::int32_t int_row[kPanelLanes];
};

// Vectors are made where they are used: one that a lambda captures may lie on a stack that is not aligned for it.
HWY_INLINE Pair none() { return {hn::Zero(FloatTag()), hn::Zero(FloatTag())}; }

// Seconds of the fastest of some runs.
template <class Body>
double fastest(Body body) {
  double best = 1;
  for (int run = 0; run < 7; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int repeat = 0; repeat < 4; ++repeat) body();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

// Seconds of a tile's scores with exponentials and of its values in float32, bfloat16 and int8, and of exponentials.
std::array<double, 7> time_tiles() {
  static Operands o{};
  Quantized copy{};
  copy.k8 = reinterpret_cast<std::uint8_t*>(o.k_groups);
  copy.k8_scale = copy.v8_scale = o.scale;
  copy.v8 = reinterpret_cast<std::int8_t*>(o.k_groups);
  copy.k16 = copy.v16 = reinterpret_cast<std::uint16_t*>(o.k_groups);
  const PanelQueries queries = {
      .q8 = o.q_groups, .q16 = o.q_groups, .bias = o.int_row, .q8_scale = o.row, .offset = o.row};
  const NativeDots native = native_dots();
  return {fastest([&]() HWY_ATTR {
            Pair top = none();
            StoreScores store{o.scores, &top};
            panel_gemm<ALayout::kRowMajor>(kTile, o.k, kSample, o.q, kPanelLanes, kSample, store);
            tile_mass<false>(o.scores, kTile, none(), KeepFloat{o.scores}, nullptr);
          }),
          fastest([&]() HWY_ATTR {
            AddCompensated add{o.out, o.compensation};
            panel_gemm<ALayout::kTransposed>(kSample, o.k, kSample, o.scores, kPanelLanes, kTile, add);
          }),
          fastest([&]() HWY_ATTR {
            native.bfloat16 ? bfloat16_scores<true>(copy, 0, kTile, kSample, queries, o.scores)
                            : bfloat16_scores<false>(copy, 0, kTile, kSample, queries, o.scores);
            tile_mass<false>(o.scores, kTile, none(), KeepBFloat16{o.p}, nullptr);
          }),
          fastest([&]() HWY_ATTR {
            native.bfloat16 ? add_bfloat16_values<true>(copy, 0, kTile, kSample, o.p, o.out)
                            : add_bfloat16_values<false>(copy, 0, kTile, kSample, o.p, o.out);
          }),
          fastest([&]() HWY_ATTR {
            native.int8 ? int8_scores<true>(copy, 0, kTile, kSample, queries, o.scores)
                        : int8_scores<false>(copy, 0, kTile, kSample, queries, o.scores);
            tile_mass<false>(o.scores, kTile, none(), KeepBytes{o.p}, nullptr);
          }),
          fastest([&]() HWY_ATTR {
            native.int8 ? add_int8_values<true>(copy, 0, kTile, kSample, o.p, none(), o.out)
                        : add_int8_values<false>(copy, 0, kTile, kSample, o.p, none(), o.out);
          }),
          fastest([&]() HWY_ATTR { tile_mass<false>(o.scores, kTile, none(), KeepFloat{o.scores}, nullptr); })};
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(time_tiles);

namespace {

// In sixteenths of a float32 tile's scores, so that small changes between measurements change no plan.
struct Measured {
  double scores, values, low_scores[2], low_values[2], exponentials;

  Measured() {
    const auto seconds = HWY_DYNAMIC_DISPATCH(time_tiles)();
    const auto share = [&](std::size_t of) { return std::max(1.0, std::round(16 * seconds[of] / seconds[0])) / 16; };
    scores = 1;
    values = share(1);
    low_scores[0] = share(2), low_values[0] = share(3);
    low_scores[1] = share(4), low_values[1] = share(5);
    exponentials = share(6);
  }
};

const Measured& measured() {
  static const Measured times;
  return times;
}

}  // namespace

Copies paying_copies() {
  const Measured& m = measured();
  const auto pays = [&](int i) { return m.low_scores[i] + m.low_values[i] < 0.75 * (m.scores + m.values); };
  return {.int8 = pays(1), .bfloat16 = pays(0)};
}

TileCosts tile_times(std::int64_t dim) {
  // The exponentials weigh more where heads are small; 128 channels were timed.
  const Measured& m = measured();
  const double products = static_cast<double>(dim) / 128,
               full = m.exponentials + (m.scores - m.exponentials) * products;
  const auto scores = [&](double of) { return (m.exponentials + (of - m.exponentials) * products) / full; };
  const auto values = [&](double of) { return of * products / full; };
  TileCosts costs = work_costs(static_cast<double>(kScreenRank) / static_cast<double>(dim), m.low_scores[1] < m.scores);
  costs.scores[0] = costs.scores[1] = scores(m.scores);
  costs.values[0] = costs.values[1] = values(m.values);
  costs.scores[2] = scores(std::max(m.low_scores[0], m.exponentials));
  costs.values[2] = values(m.low_values[0]);
  costs.scores[3] = costs.scores[4] = scores(std::max(m.low_scores[1], m.exponentials));
  costs.values[3] = costs.values[4] = values(m.low_values[1]);
  return costs;
}

}  // namespace adaattn::cpu
#endif
