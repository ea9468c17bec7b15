// What decides, tile by tile, whether keys are read, weighed or left out: plain numbers from the error budget.
#pragma once

#include <cmath>
#include <cstdint>

namespace adaattn {

// A tile of keys, seen from a panel of queries, is
//   left out    if every query's best screened score in it is below its best screened score by more than -screen,
//   summarised  if every query's mass in it is at most drop times the query's sum so far: mass * mean(v) stands for it,
//   high        else: scored, exponentiated and multiplied with v exactly.
struct TileRule {
  float screen;  // natural logarithm, < 0
  float drop;    // share of the running sum
};

// Rules for a budget, from the loosest to the most careful; a head that none suits runs dense.
constexpr int kRuleLevels = 8;

// The error of a head goes with the root of the screen's share or faster (measured on the heads of an 8,192-token
// language model), so a level takes about a third of it.
inline TileRule rule_for_budget(double error, int level) {
  const double careful = std::pow(0.45, level);
  return {.screen = static_cast<float>(std::log(std::fmin(0.5, 12 * std::pow(error, 1.5) * careful))),
          .drop = static_cast<float>(0.4 * error * careful)};
}

// The search for the loosest rule that a head's pilot accepts: bisection over the levels.
struct LevelSearch {
  int low = 0, high = kRuleLevels;  // rules before low are refused, high and those after are accepted (or untried)

  int next() const { return low + (high - low) / 3; }  // a loose rule costs less to try than a careful one
  bool done() const { return low == high; }
  void record(bool accepted) { accepted ? high = next() : low = next() + 1; }
};

// Tiles of one kind by one panel of queries each.
struct TileCounts {
  std::int64_t visible = 0, left_out = 0, summarised = 0, high = 0;
};

inline TileCounts add(const TileCounts& a, const TileCounts& b) {
  return {a.visible + b.visible, a.left_out + b.left_out, a.summarised + b.summarised, a.high + b.high};
}

// Multiply-adds as a share of the dense work, scores and values counted alike; rank_share is r / D of the screen.
inline double work_share(const TileCounts& tiles, double rank_share) {
  if (tiles.visible == 0) return 1;
  const auto visible = static_cast<double>(tiles.visible), scored = visible - static_cast<double>(tiles.left_out);
  return (rank_share * visible + scored + static_cast<double>(tiles.high)) / (2 * visible);
}

// A rule is worth its tiles only if it saves this share of the dense work, and a head is worth trying rules on only if
// the loosest one's screen alone leaves out this share of its tiles.
constexpr double kLeastGain = 0.15;
constexpr double kLeastLeftOut = 0.05;

// An error estimate from kProbeRows rows is accepted below error / kProbeMargin. Measured on 86 tiled heads of a
// language model, budgets 3e-3 to 1e-1, estimates were 0.24 to 1.43 of the truth (medians 0.83 to 0.94), and no head
// was over 0.65 of its budget.
constexpr int kProbeRows = 128;
constexpr double kProbeMargin = 1.6;

inline bool accepts(double estimate, double error) { return estimate * kProbeMargin <= error; }  // NaN is not accepted

}  // namespace adaattn
