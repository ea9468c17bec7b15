// What decides, tile by tile, whether keys are read, weighed or left out: plain numbers from the error budget.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "adaattn/adaattn.h"

namespace adaattn {

constexpr float kNever = -std::numeric_limits<float>::infinity();  // of screen and low

inline bool is_8_bit(std::int32_t precision) {
  return precision == ADAATTN_PRECISION_INT8 || precision == ADAATTN_PRECISION_FLOAT8;
}

// Whether some tile of the head may be scored in it.
inline bool uses_precision(const adaattn_head_plan& plan, std::int32_t precision) {
  return plan.precision == precision || (plan.low > kNever && plan.low_precision == precision);
}

// Tiles of one class by one panel of queries each.
struct TileCounts {
  std::int64_t visible = 0, dropped = 0, pooled = 0;
  std::int64_t summarised = 0,
               summarised_low = 0;  // summarised_low: those of the former that were scored in low precision
  std::int64_t low = 0, high = 0;
};

inline TileCounts add(const TileCounts& a, const TileCounts& b) {
  return {.visible = a.visible + b.visible,
          .dropped = a.dropped + b.dropped,
          .pooled = a.pooled + b.pooled,
          .summarised = a.summarised + b.summarised,
          .summarised_low = a.summarised_low + b.summarised_low,
          .low = a.low + b.low,
          .high = a.high + b.high};
}

// Squared norms of what summaries and dropped tiles make of some rows' error, and of the rows.
struct Account {
  double error = 0, norm = 0;
};

// Errors are accounted for by one panel of queries in eight, of long heads: the products that summaries save are dear.
inline bool is_accounted(std::int64_t panel, std::int64_t panels) { return panels < 32 || panel % 8 == 3; }

// What a tile's stages cost, all of them over one tile's scores in float32: multiply-adds (8-bit ones half), or time.
struct TileCosts {
  double screen;           // rank-r scores
  double scores[5];        // by adaattn_precision, with the exponentials
  double values[5];        // times v
  double summary, pooled;  // mass times mean v; a pooled tile, whole
};

// Multiply-adds.
inline TileCosts work_costs(double rank_share, bool int8_screen) {
  return {.screen = rank_share * (int8_screen ? 0.5 : 1),
          .scores = {1, 1, 1, 0.5, 0.5},
          .values = {1, 1, 1, 0.5, 0.5},
          .summary = 1.0 / 64,
          .pooled = 2.0 / 16};
}

// Whether tiles are told apart by the screen.
inline bool is_screened(const adaattn_head_plan& plan) {
  return plan.screen > kNever || (plan.low > kNever && plan.low < 0);
}

// Of a head by a plan, as a share of dense float32 tiles of those costs.
inline double cost_share(const TileCounts& tiles, const adaattn_head_plan& plan, const TileCosts& costs) {
  if (tiles.visible == 0) return 1;
  const auto count = [](std::int64_t n) { return static_cast<double>(n); };
  const double listed = count(tiles.summarised) + (is_8_bit(plan.low_precision) ? count(tiles.low) : 0);
  const double sum = (is_screened(plan) ? count(tiles.visible) * costs.screen : 0) +
                     count(tiles.summarised_low + tiles.low) * costs.scores[plan.low_precision] +
                     count(tiles.summarised - tiles.summarised_low + tiles.high) * costs.scores[plan.precision] +
                     count(tiles.low) * costs.values[plan.low_precision] +
                     count(tiles.high) * costs.values[plan.precision] + listed * costs.summary +
                     count(tiles.pooled) * costs.pooled;
  return sum / (count(tiles.visible) * (costs.scores[0] + costs.values[0]));
}

constexpr int kProbeRows = 128;  // evenly spaced rows that tell a head's error, at most,
constexpr int kProbeSets = 2;    // and so many times as many where that does not decide

}  // namespace adaattn
