// Attention within an error budget: the contract on heads that allow much, little and nothing, and the parts of the
// plan.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "adaattn/attention.h"
#include "buffer.h"
#include "common/dtype.h"
#include "common/scratch.h"
#include "cpu/droppable.h"
#include "cpu/emulated.h"
#include "cpu/key_head.h"
#include "cpu/tiled.h"
#include "plan/ladder.h"
#include "targets.h"
#include "verify/estimate.h"

namespace adaattn::testing {
namespace {

enum class Data { kLocal, kRandom };

struct Heads {
  std::int64_t query_heads = 2, key_heads = 1, queries = 4096, keys = 4096, dim = 32;
  adaattn_dtype dtype = ADAATTN_FLOAT32;
  Data data = Data::kLocal;
};

// q, k and v of slowly turning directions: a query's score is large for keys near its place alone, as in local heads.
class Inputs {
 public:
  explicit Inputs(const Heads& heads) : heads_(heads) {
    Random random(11);
    const auto fill = [&](std::int64_t count, std::int64_t tokens, float amplitude, bool turning) {
      std::vector<float> values(static_cast<std::size_t>(count * tokens * heads.dim));
      for (std::size_t x = 0; x < values.size(); ++x) {
        const auto place = static_cast<std::int64_t>(x) / heads.dim % tokens,
                   c = static_cast<std::int64_t>(x) % heads.dim;
        const double angle = static_cast<double>(place) * 0.005 * static_cast<double>(c / 2 + 1);
        const double falling = std::pow(0.85, static_cast<double>(c / 2));  // what few dimensions can hold
        values[x] = turning
                        ? amplitude * static_cast<float>(falling * (c % 2 == 0 ? std::cos(angle) : std::sin(angle))) +
                              0.3F * random.normal()
                        : random.normal();
      }
      return values;
    };
    const bool local = heads.data == Data::kLocal;
    q_ = fill(heads.query_heads, heads.queries, 4, local);
    k_ = fill(heads.key_heads, heads.keys, 4, local);
    v_ = fill(heads.key_heads, heads.keys, 0, false);
  }

  std::vector<float>& q() { return q_; }
  const std::vector<float>& k() const { return k_; }
  std::vector<float>& v() { return v_; }

  struct Result {
    std::vector<float> out, lse, entropy;
    std::vector<adaattn_head_report> reports;
    std::vector<std::uint8_t> classes;
    adaattn_stage_times times{};
  };

  // options over defaults; out as float32.
  Result run(const char* kernel, double error, bool causal = true, const std::int64_t* key_lengths = nullptr,
             const std::vector<adaattn_head_plan>& plans = {}) {
    const auto rows = static_cast<std::size_t>(heads_.query_heads * heads_.queries);
    Result result{
        .out = std::vector<float>(rows * static_cast<std::size_t>(heads_.dim), NAN),
        .lse = std::vector<float>(rows, NAN),
        .entropy = std::vector<float>(rows, NAN),
        .reports = std::vector<adaattn_head_report>(static_cast<std::size_t>(heads_.query_heads)),
        .classes = std::vector<std::uint8_t>(static_cast<std::size_t>(heads_.query_heads * classes_of_head()), 0xFF)};
    std::vector<std::uint16_t> storage[4];
    const auto tensor = [&](std::vector<float>& values, std::int64_t count, std::int64_t tokens, int slot) {
      Tensor view = adaattn::view(values.data(), {1, count, tokens, heads_.dim});
      if (heads_.dtype == ADAATTN_FLOAT32) return view;
      for (const float value : values) storage[slot].push_back(float_to_bfloat16(value));
      view.data = storage[slot].data();
      view.dtype = heads_.dtype;
      return view;
    };
    ForwardArgs args = forward_args(
        tensor(q_, heads_.query_heads, heads_.queries, 0), tensor(k_, heads_.key_heads, heads_.keys, 1),
        tensor(v_, heads_.key_heads, heads_.keys, 2), tensor(result.out, heads_.query_heads, heads_.queries, 3));
    args.lse = result.lse.data();
    args.entropy = result.entropy.data();
    args.heads = result.reports.data();
    args.tile_classes = result.classes.data();
    args.times = &result.times;
    if (!plans.empty()) args.plans = plans.data();
    args.key_lengths = key_lengths;
    args.options.causal = causal ? 1 : 0;
    args.options.alignment = ADAATTN_BOTTOM_RIGHT;
    args.options.error = error;
    args.options.kernel = kernel;
    adaattn::forward(args);
    for (std::size_t x = 0; x < storage[3].size(); ++x) result.out[x] = bfloat16_to_float(storage[3][x]);
    return result;
  }

  std::int64_t classes_of_head() const {
    const std::int64_t lanes = adaattn_panel_rows();
    return (heads_.queries + lanes - 1) / lanes * ((heads_.keys + 63) / 64);
  }

  double error_of_head(const Result& got, const Result& exact, std::int64_t head) const {
    double error = 0, norm = 0;
    const auto size = static_cast<std::size_t>(heads_.queries * heads_.dim),
               first = static_cast<std::size_t>(head) * size;
    for (std::size_t x = first; x < first + size; ++x) {
      error += (static_cast<double>(got.out[x]) - exact.out[x]) * (static_cast<double>(got.out[x]) - exact.out[x]);
      norm += static_cast<double>(exact.out[x]) * exact.out[x];
    }
    return std::sqrt(error / norm);
  }

 private:
  Heads heads_;
  std::vector<float> q_, k_, v_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// For a layout, aligned as a caller's workspace.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : values_(bytes / 8 + 8) {}
  void* data() const {
    return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(values_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<double> values_;
};

struct Variant {
  const char* name;
  Heads heads;
  bool causal = true;
  std::vector<std::int64_t> key_lengths = {};
};

class Budget : public ::testing::TestWithParam<Variant> {};

TEST_P(Budget, EveryHeadStaysWithinItAndSaysHow) {
  const Variant& variant = GetParam();
  Inputs inputs(variant.heads);
  const std::int64_t* lengths = variant.key_lengths.empty() ? nullptr : variant.key_lengths.data();
  const Inputs::Result exact = inputs.run("cpu_flash", 0, variant.causal, lengths);
  for (const double error : {0.1, 0.01}) {
    const Inputs::Result got = inputs.run("cpu_adaptive", error, variant.causal, lengths);
    for (std::int64_t h = 0; h < variant.heads.query_heads; ++h) {
      const adaattn_head_report& report = got.reports[static_cast<std::size_t>(h)];
      const double found = inputs.error_of_head(got, exact, h);
      // Both outputs of a 16-bit problem are rounded: 2^-9 apart at most for bfloat16, which the budget does not count.
      const double rounding = variant.heads.dtype == ADAATTN_FLOAT32 ? 0 : 0x1p-8;
      EXPECT_LE(found, error + rounding) << "head " << h;
      EXPECT_LE(report.estimated_error, report.estimated_limit);
      EXPECT_LE(report.estimated_limit, error);
      if (error == 0.1) {
        EXPECT_LT(report.work, 1);
      }
      if (report.plan.form == ADAATTN_DENSE) continue;  // what is cheaper depends on the machine
      std::array<std::int64_t, 7> counts{};
      for (std::int64_t i = 0; i < inputs.classes_of_head(); ++i)
        ++counts.at(got.classes[static_cast<std::size_t>(h * inputs.classes_of_head() + i)]);
      EXPECT_EQ(counts[ADAATTN_TILE_DROPPED], report.dropped_tiles);
      EXPECT_EQ(counts[ADAATTN_TILE_POOLED], report.pooled_tiles);
      EXPECT_EQ(counts[ADAATTN_TILE_SUMMARISED] + counts[ADAATTN_TILE_SUMMARISED_LOW], report.summarised_tiles);
      EXPECT_EQ(counts[ADAATTN_TILE_LOW], report.low_tiles);
      EXPECT_EQ(counts[ADAATTN_TILE_HIGH], report.high_tiles);
      EXPECT_EQ(inputs.classes_of_head() - counts[ADAATTN_TILE_HIDDEN], report.tiles);
    }
    EXPECT_GT(got.times.measure * got.times.plan * got.times.attend * got.times.verify, 0);
    // Mass that is left out or misjudged moves a row's log-sum-exp by its share, and the output by about as much: v is
    // random here. Entropies are a few nats, of which a share m of the mass moves m log(1 / m) and more.
    double lse = 0, entropy = 0;
    for (std::size_t row = 0; row < got.lse.size(); ++row) {
      lse += std::abs(got.lse[row] - exact.lse[row]) / static_cast<double>(got.lse.size());
      entropy += std::abs(got.entropy[row] - exact.entropy[row]) / static_cast<double>(got.lse.size());
    }
    EXPECT_LT(lse, 2 * error);
    EXPECT_LT(entropy, 6 * error);
  }
}

std::string variant_name(const ::testing::TestParamInfo<Variant>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Heads, Budget,
                         ::testing::Values(Variant{"causal", {}}, Variant{"full", {}, false},
                                           Variant{"grouped", {.query_heads = 4, .key_heads = 2, .dim = 48}},
                                           Variant{"bfloat16", {.dtype = ADAATTN_BFLOAT16}},
                                           Variant{"after_a_cache", {.queries = 4128, .keys = 5000}},
                                           Variant{"key_length", {.keys = 4300}, true, {4096}}),
                         variant_name);

TEST(Adaptive, KeepsTheBudgetOnEveryInstructionSet) {
  Inputs inputs({});
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const Inputs::Result got = inputs.run("cpu_adaptive", 0.05);
    for (std::int64_t h = 0; h < 2; ++h)
      EXPECT_LE(inputs.error_of_head(got, exact, h), 0.05) << hwy::TargetName(target);
  }
}

TEST(Adaptive, GivesTheSameBitsOnEveryRun) {
  Inputs inputs({});
  EXPECT_TRUE(same_bits(inputs.run("cpu_adaptive", 0.03).out, inputs.run("cpu_adaptive", 0.03).out));
}

TEST(Adaptive, RunsDenseInFloat32WhereNothingElseWillDo) {
  Inputs inputs({.data = Data::kRandom});
  const Inputs::Result got = inputs.run("cpu_adaptive", 1e-4);
  EXPECT_TRUE(same_bits(got.out, inputs.run("cpu_flash", 0).out));
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_EQ(got.reports[0].plan.precision, ADAATTN_PRECISION_FLOAT32);
  EXPECT_EQ(got.reports[0].tiles, 0);
  EXPECT_GE(got.reports[0].work, 1);
  for (const std::uint8_t tile : got.classes) EXPECT_EQ(tile, ADAATTN_TILE_HIGH);
}

// A plan that a budget of 10 leaves as it is.
adaattn_head_plan tiles(std::int32_t precision, std::int32_t low_precision, float low) {
  adaattn_head_plan plan = dense_plan(precision);
  plan.form = ADAATTN_TILED;
  plan.low_precision = low_precision;
  plan.low = low;
  return plan;
}

// Whatever thresholds a dense plan holds.
TEST(Plans, OfDenseHeadsUseEveryTile) {
  Inputs inputs({.queries = 300, .keys = 400});
  for (const std::int32_t precision : {ADAATTN_PRECISION_INT8, ADAATTN_PRECISION_BFLOAT16}) {
    adaattn_head_plan plan = tiled_plan(0.1, 0, {precision, ADAATTN_PRECISION_FLOAT8, 0});
    plan.form = ADAATTN_DENSE;
    plan.drop = 0.1F;
    const Inputs::Result got = inputs.run("cpu_adaptive", 10, true, nullptr, {plan, plan});
    const adaattn_head_plan plain = dense_plan(precision);
    EXPECT_TRUE(same_bits(got.out, inputs.run("cpu_adaptive", 10, true, nullptr, {plain, plain}).out));
    EXPECT_EQ(got.reports[0].plan.screen, kNever) << "reported as it ran";
    for (const std::uint8_t c : got.classes) EXPECT_TRUE(c == ADAATTN_TILE_HIGH || c == ADAATTN_TILE_HIDDEN);
  }
}

TEST(Plans, RunInEveryPrecisionOnEveryInstructionSet) {
  // D and Dv that are no multiples of 4, and tiles that end early.
  Inputs inputs({.query_heads = 2, .key_heads = 1, .queries = 1000, .keys = 1050, .dim = 30, .data = Data::kRandom});
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  struct Expected {
    adaattn_head_plan plan;
    double least, most;  // relative error
  };
  // float32: rounding. bfloat16: 2^-9 of q, k, p and v each, times scores of a few units. int8: steps of a 254th of
  // the largest of about 30 normal values, 2.1 sigma, in q and k: 5e-3 sigma each and as much again from p and v.
  const Expected expected[] = {{tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_FLOAT32, kNever), 0, 1e-6},
                               {tiles(ADAATTN_PRECISION_BFLOAT16, ADAATTN_PRECISION_BFLOAT16, kNever), 1e-4, 8e-3},
                               {tiles(ADAATTN_PRECISION_INT8, ADAATTN_PRECISION_INT8, kNever), 1e-3, 3e-2},
                               {tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_INT8, 0), 1e-3, 3e-2},
                               // float16: 2^-12 in the mean. float8: 2^-5 in the mean of q, k, p and v each.
                               {tiles(ADAATTN_PRECISION_FLOAT16, ADAATTN_PRECISION_FLOAT16, kNever), 1e-5, 1e-3},
                               {tiles(ADAATTN_PRECISION_FLOAT8, ADAATTN_PRECISION_FLOAT8, kNever), 1e-2, 1e-1},
                               {tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_BFLOAT16, -0.5F), 0, 8e-3},
                               {tiles(ADAATTN_PRECISION_BFLOAT16, ADAATTN_PRECISION_INT8, -0.5F), 1e-4, 3e-2}};
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    for (const Expected& e : expected) {
      const Inputs::Result got = inputs.run("cpu_adaptive", 10, true, nullptr, {e.plan, e.plan});
      for (std::int64_t h = 0; h < 2; ++h) {
        const double error = inputs.error_of_head(got, exact, h);
        EXPECT_GE(error, e.least) << hwy::TargetName(target) << " " << e.plan.precision << e.plan.low_precision;
        EXPECT_LE(error, e.most) << hwy::TargetName(target) << " " << e.plan.precision << e.plan.low_precision;
        EXPECT_EQ(got.reports[static_cast<std::size_t>(h)].escalations, 0);
      }
      for (std::size_t row = 0; row < got.lse.size(); ++row) {
        EXPECT_NEAR(got.lse[row], exact.lse[row], 0.1) << row;
        EXPECT_NEAR(got.entropy[row], exact.entropy[row], 0.1) << row;
      }
    }
  }
}

TEST(Plans, OfAReportGiveTheSameBitsAgain) {
  Inputs inputs({});
  for (const double error : {0.1, 0.01}) {
    const Inputs::Result first = inputs.run("cpu_adaptive", error);
    ASSERT_EQ(first.reports[0].escalations, 0);
    const Inputs::Result again =
        inputs.run("cpu_adaptive", error, true, nullptr, {first.reports[0].plan, first.reports[1].plan});
    EXPECT_TRUE(same_bits(first.out, again.out));
    EXPECT_EQ(first.classes, again.classes);
    EXPECT_LT(again.reports[0].work, first.reports[0].work) << "nothing was tried";
  }
}

TEST(Plans, ThatAreAutomaticLeaveTheChoiceToTheEngine) {
  Inputs inputs({});
  adaattn_head_plan automatic = dense_plan(ADAATTN_PRECISION_FLOAT32);
  automatic.form = ADAATTN_AUTOMATIC;
  EXPECT_TRUE(same_bits(inputs.run("cpu_adaptive", 0.05).out,
                        inputs.run("cpu_adaptive", 0.05, true, nullptr, {automatic, automatic}).out));
}

TEST(Plans, AreMadeMoreCarefulUntilTheBudgetHolds) {
  Inputs inputs({});
  adaattn_head_plan careless = tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_FLOAT32, kNever);
  careless.screen = -0.1F;
  careless.drop = 0.5F;
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  const Inputs::Result got = inputs.run("cpu_adaptive", 0.01, true, nullptr, {careless, careless});
  for (std::int64_t h = 0; h < 2; ++h) {
    EXPECT_GT(got.reports[static_cast<std::size_t>(h)].escalations, 0);
    EXPECT_LE(inputs.error_of_head(got, exact, h), 0.01);
  }
}

TEST(Plans, WithoutAScreenNeverComeToNeedOne) {
  Inputs inputs({.data = Data::kRandom});
  const adaattn_head_plan low = tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_INT8, 0);
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  const double error = 0.8 * inputs.error_of_head(inputs.run("cpu_adaptive", 10, true, nullptr, {low, low}), exact, 0);
  const Inputs::Result got = inputs.run("cpu_adaptive", error, true, nullptr, {low, low});
  EXPECT_GT(got.reports[0].escalations, 0);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_LE(inputs.error_of_head(got, exact, 0), error);
}

TEST(Plans, PoolWhatTheScreenLeavesOut) {
  Inputs inputs({});
  adaattn_head_plan dropping = tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_FLOAT32, kNever), pooling = dropping;
  dropping.screen = pooling.screen = -0.5F;
  pooling.pooled = 1;
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  const Inputs::Result dropped = inputs.run("cpu_adaptive", 10, true, nullptr, {dropping, dropping});
  const Inputs::Result pooled = inputs.run("cpu_adaptive", 10, true, nullptr, {pooling, pooling});
  EXPECT_EQ(pooled.reports[0].pooled_tiles, dropped.reports[0].dropped_tiles);
  EXPECT_EQ(pooled.reports[0].dropped_tiles, 0);
  // Keys that turn slowly are near their means: what they weigh is told well, what they carry, random v, is averaged.
  double lse_dropped = 0, lse_pooled = 0;
  for (std::size_t row = 0; row < exact.lse.size(); ++row) {
    lse_dropped += std::abs(dropped.lse[row] - exact.lse[row]);
    lse_pooled += std::abs(pooled.lse[row] - exact.lse[row]);
  }
  EXPECT_LT(lse_pooled, 0.3 * lse_dropped);
}

TEST(Plans, KeepTilesOfWhichOneValueStandsOut) {
  Inputs inputs({});
  adaattn_head_plan dropping = tiles(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_FLOAT32, kNever);
  dropping.screen = -0.5F;
  const auto dropped = [&](std::size_t tile) {
    const Inputs::Result got = inputs.run("cpu_adaptive", 10, true, nullptr, {dropping, dropping});
    int count = 0;
    for (std::size_t at = tile; at < got.classes.size(); at += 64)
      count += static_cast<int>(got.classes[at] == ADAATTN_TILE_DROPPED);
    return count;
  };
  constexpr std::size_t kTile = 9, kDim = 32;
  const int before = dropped(kTile), neighbour = dropped(kTile + 1);
  EXPECT_GT(before, 0);
  for (std::size_t c = 0; c < kDim; ++c)
    inputs.v()[(kTile * 64 + 5) * kDim + c] *= 20;  // 20 / sqrt(20^2 / 64 + 1) = 7.4
  EXPECT_EQ(dropped(kTile), 0);
  EXPECT_EQ(dropped(kTile + 1), neighbour);
}

// q and k of a curve in three dimensions, that a few keys can stand for.
TEST(Plans, OfLowRankAreJudgedByTheirOwnError) {
  Inputs inputs({.queries = 512, .keys = 512});
  const Inputs::Result exact = inputs.run("cpu_flash", 0, false);
  const Inputs::Result got =
      inputs.run("cpu_adaptive", 10, false, nullptr, {low_rank_plan(256), dense_plan(ADAATTN_PRECISION_FLOAT32)});
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_LOW_RANK);
  EXPECT_EQ(got.reports[0].plan.rank, 256);
  EXPECT_EQ(got.reports[0].tiles, 0);
  EXPECT_GT(got.reports[0].estimated_error, 0);
  const double error = inputs.error_of_head(got, exact, 0);
  EXPECT_LT(error, 1);
  EXPECT_NEAR(got.reports[0].estimated_error / error, 1, 0.5);  // from 32 of 512 rows
  EXPECT_TRUE(std::isnan(got.entropy[0])) << "a coreset has no entropy of the softmax to give";
  EXPECT_EQ(inputs.error_of_head(got, exact, 1), 0);
  const Inputs::Result careful =
      inputs.run("cpu_adaptive", 1e-3, false, nullptr, {low_rank_plan(16), low_rank_plan(16)});
  EXPECT_EQ(careful.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_EQ(careful.reports[0].escalations, 1);
  EXPECT_TRUE(same_bits(careful.out, exact.out));
}

TEST(Plans, ThatNoKernelCanRunAreRefused) {
  Inputs inputs({});
  const auto refuse = [&](const char* field, auto change) {
    adaattn_head_plan plan = dense_plan(ADAATTN_PRECISION_FLOAT32);
    change(plan);
    try {
      inputs.run("cpu_adaptive", 0.1, true, nullptr, {dense_plan(ADAATTN_PRECISION_FLOAT32), plan});
      ADD_FAILURE() << field;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(field), std::string::npos) << error.what();
    }
  };
  refuse("plans[1].form", [](adaattn_head_plan& p) { p.form = 3; });
  refuse("plans[1].precision", [](adaattn_head_plan& p) { p.precision = -1; });
  refuse("plans[1].low_precision", [](adaattn_head_plan& p) { p.low_precision = 5; });
  refuse("plans[1].pooled", [](adaattn_head_plan& p) { p.pooled = 2; });
  refuse("plans[1].rank", [](adaattn_head_plan& p) { p.form = ADAATTN_LOW_RANK; });
  refuse("low rank under a causal mask", [](adaattn_head_plan& p) { p = low_rank_plan(8); });
  refuse("plans[1].screen", [](adaattn_head_plan& p) { p.screen = NAN; });
  refuse("plans[1].low", [](adaattn_head_plan& p) { p.low = 1; });
  refuse("plans[1].drop", [](adaattn_head_plan& p) { p.drop = 2; });
  try {
    inputs.run(nullptr, 0, true, nullptr, {dense_plan(0), dense_plan(0)});
    ADD_FAILURE() << "a plan without a budget";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("options.error is 0"), std::string::npos) << error.what();
  }
}

TEST(Adaptive, RunsDenseForHeadsWithNanOrInfinity) {
  Inputs inputs({});
  inputs.v()[77 * 32 + 5] = std::numeric_limits<float>::quiet_NaN();
  inputs.v()[900 * 32 + 6] = std::numeric_limits<float>::infinity();
  const Inputs::Result got = inputs.run("cpu_adaptive", 0.1), exact = inputs.run("cpu_flash", 0);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  for (std::size_t x = 0; x < got.out.size(); ++x) EXPECT_EQ(std::isnan(got.out[x]), std::isnan(exact.out[x])) << x;
}

TEST(Adaptive, FindsNanPastWhatAGlanceReads) {
  Inputs inputs({});
  inputs.v()[3000 * 32 + 5] = std::numeric_limits<float>::quiet_NaN();
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  for (const double error : {3e-2, 1e-2, 3e-3}) {
    const Inputs::Result got = inputs.run("cpu_adaptive", error);
    for (std::size_t h = 0; h < 2; ++h) EXPECT_EQ(got.reports[h].plan.precision, ADAATTN_PRECISION_FLOAT32) << error;
    for (std::size_t x = 0; x < got.out.size(); ++x) {
      EXPECT_EQ(std::isnan(got.out[x]), std::isnan(exact.out[x])) << x << " at " << error;
      if (std::isnan(exact.out[x])) continue;
      EXPECT_EQ(got.out[x], exact.out[x]) << x << " at " << error;
    }
  }
}

TEST(Adaptive, DoesNotTrustLowPrecisionWithScoresOfHundreds) {
  // Nearly every row is one key's, whose value a rounded score leaves alone: the trial rows show hardly an error, and
  // the log-sum-exp shows it.
  Inputs inputs({.data = Data::kRandom});
  for (float& x : inputs.q()) x *= 100;
  const Inputs::Result got = inputs.run("cpu_adaptive", 1e-2);
  for (const adaattn_head_report& report : got.reports) {
    EXPECT_EQ(report.plan.precision, ADAATTN_PRECISION_FLOAT32);
    EXPECT_EQ(report.escalations, 0);
  }
}

TEST(Adaptive, IsNotChosenForABudgetOfZero) {
  Inputs inputs({});
  const Inputs::Result got = inputs.run(nullptr, 0);
  EXPECT_TRUE(same_bits(got.out, inputs.run("cpu_flash", 0).out));
  EXPECT_EQ(got.reports[1].work, 1);
  EXPECT_THROW(inputs.run("cpu_adaptive", 0), Error);
}

TEST(Float8, RoundsToTheNearestE4m3Value) {
  const float exact[] = {0, 0x1p-9F, 0x1p-6F, 0.9375F, 1, 1.125F, 240, 416, 448};
  for (const float value : exact) {
    EXPECT_EQ(cpu::round_to_float8(value), value);
    EXPECT_EQ(cpu::round_to_float8(-value), -value);
  }
  EXPECT_EQ(cpu::round_to_float8(1.0625F), 1) << "half way, to even";
  EXPECT_EQ(cpu::round_to_float8(1.1875F), 1.25F) << "half way, to even";
  EXPECT_EQ(cpu::round_to_float8(1.07F), 1.125F);
  EXPECT_EQ(cpu::round_to_float8(0x1p-10F), 0) << "half of the least, to even";
  EXPECT_EQ(cpu::round_to_float8(0x1.8p-10F), 0x1p-9F);
  EXPECT_EQ(cpu::round_to_float8(1e9F), 448);
}

TEST(LevelSearch, FindsTheLoosestAcceptedLevel) {
  for (int loosest = 0; loosest <= kRuleLevels; ++loosest) {
    LevelSearch search;
    int steps = 0;
    for (; !search.done(); ++steps) search.record(search.next() >= loosest);
    EXPECT_EQ(search.high, loosest);
    EXPECT_LE(steps, 5);
  }
}

TEST(TiledPlan, GetsMoreCarefulWithTheLevelAndTheBudget) {
  const Precisions float32 = precisions_for(0.1, INFINITY, INFINITY);
  EXPECT_EQ(float32.high, ADAATTN_PRECISION_FLOAT32);
  EXPECT_EQ(float32.low_share, kNever);
  for (int level = 1; level < kRuleLevels; ++level) {
    EXPECT_LE(tiled_plan(0.1, level, float32).screen, tiled_plan(0.1, level - 1, float32).screen);
    EXPECT_LT(tiled_plan(0.03, level, float32).drop, tiled_plan(0.03, level - 1, float32).drop);
    EXPECT_EQ(tiled_plan(0.1, level, float32).drop, 0) << "loose budgets do without summaries";
  }
  EXPECT_LT(tiled_plan(0.01, 0, float32).screen, tiled_plan(0.1, 0, float32).screen);
  EXPECT_LT(tiled_plan(1e9, 0, float32).screen, 0) << "however large the budget, a row's best tile stays";
}

TEST(Precisions, FollowTheErrorsThatWereMeasured) {
  EXPECT_EQ(precisions_for(0.1, 1e-2, 1e-3).low, ADAATTN_PRECISION_INT8);
  EXPECT_EQ(precisions_for(0.1, 1e-2, 1e-3).low_share, 0) << "int8 alone is good enough";
  EXPECT_EQ(precisions_for(0.01, 1e-2, 1e-3).high, ADAATTN_PRECISION_BFLOAT16);
  EXPECT_LT(precisions_for(0.01, 1e-2, 1e-3).low_share, 0) << "int8 where it matters little";
  EXPECT_EQ(precisions_for(0.003, 1e-2, 3e-3).high, ADAATTN_PRECISION_FLOAT32);
  EXPECT_EQ(precisions_for(0.003, 1e-2, 3e-3).low, ADAATTN_PRECISION_BFLOAT16);
  EXPECT_EQ(precisions_for(0.0001, 1e-2, 3e-3).low_share, kNever);
}

TEST(CostShare, CountsScoresValuesMeansAndTheScreen) {
  const TileCosts costs = work_costs(0.125, false);
  adaattn_head_plan plan = tiled_plan(0.1, 0, precisions_for(0.1, INFINITY, INFINITY));
  EXPECT_DOUBLE_EQ(cost_share({.visible = 100, .dropped = 100}, plan, costs), 0.0625);
  EXPECT_DOUBLE_EQ(cost_share({.visible = 100, .dropped = 40, .summarised = 50, .high = 10}, plan, costs),
                   0.0625 + 0.35 + 50.0 / 64 / 200);
  EXPECT_DOUBLE_EQ(cost_share({}, plan, costs), 1);
  plan.low_precision = ADAATTN_PRECISION_INT8;
  plan.low = 0;
  plan.screen = kNever;
  EXPECT_DOUBLE_EQ(cost_share({.visible = 100, .low = 100}, plan, costs), 0.5 + 1.0 / 128);
}

TEST(Estimate, IsCarefulWhereErrorsOrNormsLieInFewRows) {
  ProbeSums even, spread, few;
  for (int row = 0; row < 128; ++row) {
    even.add(1e-4, 1);
    spread.add(2e-4 * (row % 2), 1);
    few.add(row == 7 ? 128e-4 : 0, 1);
  }
  EXPECT_NEAR(estimate_error(even, 8192, 8192).value, 1e-2, 1e-9);
  EXPECT_NEAR(estimate_error(even, 8192, 8192).limit, 1e-2, 1e-9);
  // Standard error of the mean of 0 and 2 in turns: 1 / sqrt(128), up to the factor n / (n - 1).
  EXPECT_NEAR(estimate_error(spread, 8192, 8192).limit, 1e-2 * std::sqrt(1 + kConfidence / std::sqrt(127.0)), 1e-5);
  EXPECT_NEAR(estimate_error(few, 8192, 8192).limit, 1e-2 * std::sqrt(1 + kConfidence), 1e-4);
  EXPECT_NEAR(estimate_error(even, 8192, 8192 / 4.0).value, 2e-2, 1e-9) << "the other rows' norms are smaller";
  EXPECT_NEAR(estimate_error(even, 8192, 8192 * 4.0).value, 1e-2, 1e-9) << "their errors may be larger, too";
  ProbeSums not_a_number = even;
  not_a_number.add(NAN, 1);
  EXPECT_FALSE(accepts(estimate_error(not_a_number, 8192, 8192), 1e9));
}

TEST(Droppable, CountsTilesBelowEveryRowsBest) {
  constexpr std::int64_t kTokens = 1000, kDim = 32;
  Inputs inputs({.query_heads = 2, .key_heads = 1, .queries = kTokens, .keys = kTokens, .dim = kDim});
  std::vector<float> k = inputs.k();
  ForwardArgs args = forward_args(
      adaattn::view(inputs.q().data(), {1, 2, kTokens, kDim}), adaattn::view(k.data(), {1, 1, kTokens, kDim}),
      adaattn::view(inputs.v().data(), {1, 1, kTokens, kDim}), adaattn::view(inputs.v().data(), {1, 2, kTokens, kDim}));
  args.options.causal = 1;
  Scratch sizes(nullptr);
  cpu::lay_out_key_head_thread(args, sizes);
  const Memory memory(sizes.bytes());
  Scratch scratch(memory.data());
  const cpu::KeyHeadScratch thread = cpu::lay_out_key_head_thread(args, scratch);
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const auto lanes = static_cast<std::int64_t>(cpu::panel_rows());
    const std::int64_t first = std::min(kTokens * 7 / 8, kTokens - lanes), tiles = (first + 1) / 64;
    constexpr double kBelow = -3;
    std::int64_t expected = 0;
    std::vector<double> best(static_cast<std::size_t>(lanes), -INFINITY);
    std::vector<std::vector<double>> tops(static_cast<std::size_t>(tiles), best);
    const auto looked_at = [&](std::int64_t tile) { return tile % 3 == 0 || tile >= tiles - 4; };
    for (std::int64_t row = 0; row < lanes; ++row)
      for (std::int64_t key = 0; key < tiles * 64; ++key) {
        if (!looked_at(key / 64)) continue;
        double score = 0;
        for (std::int64_t c = 0; c < kDim; ++c)  // of the second query head
          score += static_cast<double>(inputs.q()[static_cast<std::size_t>((kTokens + first + row) * kDim + c)]) *
                   k[static_cast<std::size_t>(key * kDim + c)] / std::sqrt(static_cast<double>(kDim));
        double& top = tops[static_cast<std::size_t>(key / 64)][static_cast<std::size_t>(row)];
        top = std::max(top, score);
        best[static_cast<std::size_t>(row)] = std::max(best[static_cast<std::size_t>(row)], score);
      }
    std::int64_t count = 0;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      if (!looked_at(tile)) continue;
      ++count;
      bool all = true;
      for (std::size_t row = 0; row < best.size(); ++row)
        all = all && tops[static_cast<std::size_t>(tile)][row] < best[row] + kBelow;
      expected += static_cast<std::int64_t>(all);
    }
    EXPECT_GT(expected, 0);
    EXPECT_LT(expected, count);
    EXPECT_DOUBLE_EQ(cpu::droppable_share(args, 0, 1, kBelow, thread),
                     static_cast<double>(expected) / static_cast<double>(count))
        << hwy::TargetName(target);
  }
}

TEST(KeyHead, HoldsTheSameHoweverItIsFilled) {
  constexpr std::int64_t kKeys = 300, kDim = 40;
  Inputs inputs({.query_heads = 1, .queries = kKeys, .keys = kKeys, .dim = kDim});
  std::vector<float> k = inputs.k();
  const ForwardArgs args = forward_args(
      adaattn::view(inputs.q().data(), {1, 1, kKeys, kDim}), adaattn::view(k.data(), {1, 1, kKeys, kDim}),
      adaattn::view(inputs.v().data(), {1, 1, kKeys, kDim}), adaattn::view(inputs.v().data(), {1, 1, kKeys, kDim}));
  constexpr cpu::Copies kBoth = {.int8 = true, .bfloat16 = true};
  const cpu::Parts parts = {.screen = false, .int8_screen = false, .copies = kBoth};
  const auto lay_out = [&](Scratch& scratch) {
    const cpu::KeyHead head = cpu::lay_out_key_head(args, parts, scratch);
    return std::pair(head, cpu::lay_out_key_head_thread(args, scratch));
  };
  Scratch sizes(nullptr);
  lay_out(sizes);
  const Memory whole_memory(sizes.bytes()), parts_memory(sizes.bytes());
  Scratch whole_scratch(whole_memory.data()), parts_scratch(parts_memory.data());
  auto [whole, whole_thread] = lay_out(whole_scratch);
  auto [in_parts, parts_thread] = lay_out(parts_scratch);
  cpu::begin_key_head(args, 0, 0, kKeys, whole_thread, whole);
  EXPECT_EQ(whole.begun, kKeys);
  cpu::begin_key_head(args, 0, 0, 70, parts_thread, in_parts);
  EXPECT_EQ(in_parts.begun, 128) << "whole tiles";
  EXPECT_TRUE(cpu::fill_tiles(args, 0, 0, {256, kKeys}, kBoth, parts_thread, in_parts));
  EXPECT_TRUE(cpu::fill_tiles(args, 0, 0, {128, 256}, {.int8 = true, .bfloat16 = false}, parts_thread, in_parts));
  EXPECT_TRUE(cpu::fill_tiles(args, 0, 0, {128, 256}, {.int8 = false, .bfloat16 = true}, parts_thread, in_parts));
  const auto same = [](const auto* a, const auto* b, std::size_t count) { return std::equal(a, a + count, b); };
  EXPECT_TRUE(same(whole.mean, in_parts.mean, kDim));
  EXPECT_TRUE(same(whole.value_means, in_parts.value_means, 5 * 64));  // 40 rounded up to panels
  EXPECT_TRUE(same(whole.copy.k8, in_parts.copy.k8, kKeys * kDim));
  EXPECT_TRUE(same(whole.copy.k8_scale, in_parts.copy.k8_scale, kKeys));
  EXPECT_TRUE(same(whole.copy.v8, in_parts.copy.v8, 320 * kDim));
  EXPECT_TRUE(same(whole.copy.v8_scale, in_parts.copy.v8_scale, 5 * kDim));
  EXPECT_TRUE(same(whole.copy.k16, in_parts.copy.k16, kKeys * kDim));
  EXPECT_TRUE(same(whole.copy.v16, in_parts.copy.v16, 320 * kDim));

  inputs.v()[200 * kDim] = INFINITY;
  EXPECT_TRUE(cpu::fill_tiles(args, 0, 0, {0, 192}, kBoth, parts_thread, in_parts));
  EXPECT_FALSE(cpu::fill_tiles(args, 0, 0, {128, kKeys}, kBoth, parts_thread, in_parts));
}

TEST(Screen, HoldsAProductOfItsRankWhole) {
  // q and k on 8 directions each: Q Kc^T has rank 8 at most, and 16 dimensions hold all of it.
  constexpr std::int64_t kTokens = 300, kDim = 40;
  Random random(5);
  const auto low_rank = [&] {
    std::vector<float> left(kTokens * 8), right(8 * kDim), values(kTokens * kDim, 0.0F);
    for (float& x : left) x = random.normal();
    for (float& x : right) x = random.normal();
    for (std::size_t i = 0; i < kTokens; ++i)
      for (std::size_t j = 0; j < 8; ++j)
        for (std::size_t c = 0; c < kDim; ++c) values[i * kDim + c] += left[i * 8 + j] * right[j * kDim + c];
    return values;
  };
  std::vector<float> q = low_rank(), k = low_rank(), v(kTokens * kDim);
  for (float& x : v) x = random.normal();
  const auto tensor = [](std::vector<float>& x) { return adaattn::view(x.data(), {1, 1, kTokens, kDim}); };
  const ForwardArgs args = forward_args(tensor(q), tensor(k), tensor(v), tensor(v));
  Scratch sizes(nullptr);
  const cpu::Parts parts = {.screen = true, .int8_screen = false, .copies = {}};
  cpu::lay_out_key_head(args, parts, sizes);
  cpu::lay_out_key_head_thread(args, sizes);
  const Memory memory(sizes.bytes());
  Scratch scratch(memory.data());
  cpu::KeyHead screen = cpu::lay_out_key_head(args, parts, scratch);
  const cpu::KeyHeadScratch thread = cpu::lay_out_key_head_thread(args, scratch);
  cpu::begin_key_head(args, 0, 0, kTokens, thread, screen);
  cpu::find_screen(args, 0, 0, thread, screen);
  cpu::fill_screen(args, 0, 0, {0, kTokens}, thread, screen);
  EXPECT_TRUE(*screen.finite);
  const auto rank = static_cast<std::size_t>(*screen.rank);
  EXPECT_EQ(rank, cpu::kSmallRank) << "16 dimensions hold all";
  EXPECT_NEAR(*screen.energy, 1, 1e-4);  // FP32 Gram matrices of 300 rows, squared again in the energy

  std::vector<double> mean(kDim, 0.0);
  for (std::size_t i = 0; i < kTokens; ++i)
    for (std::size_t c = 0; c < kDim; ++c) mean[c] += k[i * kDim + c] / static_cast<double>(kTokens);
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < 32; ++i)
    for (std::size_t j = 0; j < kTokens; ++j) {
      double score = 0, screened = 0;
      for (std::size_t c = 0; c < kDim; ++c) score += q[i * kDim + c] * (k[j * kDim + c] - mean[c]);
      for (std::size_t r = 0; r < rank; ++r) {
        double along = 0;
        for (std::size_t c = 0; c < kDim; ++c)
          along += static_cast<double>(q[i * kDim + c]) * screen.z[c * cpu::kScreenRank + r];
        screened += along * screen.k[j * rank + r];
      }
      error += (score - screened) * (score - screened);
      norm += score * score;
    }
  EXPECT_LT(std::sqrt(error / norm), 1e-4);
  double value_mean = 0;
  for (std::size_t key = 64; key < 128; ++key) value_mean += v[key * kDim + 3] / 64.0;
  EXPECT_NEAR(screen.value_means[64 + 3], value_mean, 1e-5);  // rows of D = 40 are padded to 64
}

}  // namespace
}  // namespace adaattn::testing
