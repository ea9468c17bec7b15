// Attention within an error budget: the contract on heads that allow much, little and nothing, and the parts of the
// plan.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "adaattn/attention.h"
#include "buffer.h"
#include "common/dtype.h"
#include "common/scratch.h"
#include "cpu/screen.h"
#include "plan/tile_rule.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

enum class Data { kLocal, kRandom };

struct Heads {
  std::int64_t query_heads = 2, key_heads = 1, queries = 2048, keys = 2048, dim = 32;
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
        const double angle = static_cast<double>(place) * 0.002 * static_cast<double>(c / 2 + 1);
        values[x] = turning ? amplitude * static_cast<float>(c % 2 == 0 ? std::cos(angle) : std::sin(angle)) +
                                  0.3F * random.normal()
                            : random.normal();
      }
      return values;
    };
    const bool local = heads.data == Data::kLocal;
    q_ = fill(heads.query_heads, heads.queries, 2, local);
    k_ = fill(heads.key_heads, heads.keys, 2, local);
    v_ = fill(heads.key_heads, heads.keys, 0, false);
  }

  std::vector<float>& v() { return v_; }

  struct Result {
    std::vector<float> out, lse, entropy;
    std::vector<adaattn_head_report> reports;
  };

  // options over defaults; out as float32.
  Result run(const char* kernel, double error, bool causal = true, const std::int64_t* key_lengths = nullptr) {
    const auto rows = static_cast<std::size_t>(heads_.query_heads * heads_.queries);
    Result result{.out = std::vector<float>(rows * static_cast<std::size_t>(heads_.dim), NAN),
                  .lse = std::vector<float>(rows, NAN),
                  .entropy = std::vector<float>(rows, NAN),
                  .reports = std::vector<adaattn_head_report>(static_cast<std::size_t>(heads_.query_heads))};
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
    args.key_lengths = key_lengths;
    args.options.causal = causal ? 1 : 0;
    args.options.alignment = ADAATTN_BOTTOM_RIGHT;
    args.options.error = error;
    args.options.kernel = kernel;
    adaattn::forward(args);
    for (std::size_t x = 0; x < storage[3].size(); ++x) result.out[x] = bfloat16_to_float(storage[3][x]);
    return result;
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
      EXPECT_LE(report.estimated_error, error / kProbeMargin);
      EXPECT_EQ(report.plan.form, ADAATTN_TILED) << "head " << h << " at " << error;
      EXPECT_GT(report.dropped_tiles, 0);
      EXPECT_EQ(report.tiles, report.high_tiles + report.summarised_tiles + report.dropped_tiles);
      EXPECT_LT(report.work, 1);
    }
    for (std::size_t row = 0; row < got.lse.size(); ++row) {
      // A share of at most sqrt(error) of a row's mass can be missing if the head's error is to be what it is.
      EXPECT_NEAR(got.lse[row], exact.lse[row], std::sqrt(error)) << "row " << row;
      EXPECT_NEAR(got.entropy[row], exact.entropy[row], 3 * std::sqrt(error)) << "row " << row;
    }
  }
}

std::string variant_name(const ::testing::TestParamInfo<Variant>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Heads, Budget,
                         ::testing::Values(Variant{"causal", {}}, Variant{"full", {}, false},
                                           Variant{"grouped", {.query_heads = 4, .key_heads = 2, .dim = 48}},
                                           Variant{"bfloat16", {.dtype = ADAATTN_BFLOAT16}},
                                           Variant{"after_a_cache", {.queries = 1056, .keys = 2500}},
                                           Variant{"key_length", {.keys = 2300}, true, {2048}}),
                         variant_name);

TEST(Adaptive, KeepsTheBudgetOnEveryInstructionSet) {
  Inputs inputs({.queries = 1024, .keys = 1024});
  const Inputs::Result exact = inputs.run("cpu_flash", 0);
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const Inputs::Result got = inputs.run("cpu_adaptive", 0.05);
    for (std::int64_t h = 0; h < 2; ++h)
      EXPECT_LE(inputs.error_of_head(got, exact, h), 0.05) << hwy::TargetName(target);
    EXPECT_EQ(got.reports[0].plan.form, ADAATTN_TILED) << hwy::TargetName(target);
  }
}

TEST(Adaptive, GivesTheSameBitsOnEveryRun) {
  Inputs inputs({});
  EXPECT_TRUE(same_bits(inputs.run("cpu_adaptive", 0.03).out, inputs.run("cpu_adaptive", 0.03).out));
}

TEST(Adaptive, RunsDenseWhereNothingCanBeLeftOut) {
  Inputs inputs({.data = Data::kRandom});
  const Inputs::Result got = inputs.run("cpu_adaptive", 0.01);
  EXPECT_TRUE(same_bits(got.out, inputs.run("cpu_flash", 0).out));
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_EQ(got.reports[0].tiles, 0);
  EXPECT_GE(got.reports[0].work, 1);
}

TEST(Adaptive, RunsDenseForHeadsWithNanOrInfinity) {
  Inputs inputs({});
  inputs.v()[77 * 32 + 5] = std::numeric_limits<float>::quiet_NaN();
  inputs.v()[900 * 32 + 6] = std::numeric_limits<float>::infinity();
  const Inputs::Result got = inputs.run("cpu_adaptive", 0.1), exact = inputs.run("cpu_flash", 0);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  for (std::size_t x = 0; x < got.out.size(); ++x) EXPECT_EQ(std::isnan(got.out[x]), std::isnan(exact.out[x])) << x;
}

TEST(Adaptive, IsNotChosenForABudgetOfZero) {
  Inputs inputs({});
  const Inputs::Result got = inputs.run(nullptr, 0);
  EXPECT_TRUE(same_bits(got.out, inputs.run("cpu_flash", 0).out));
  EXPECT_EQ(got.reports[1].work, 1);
  EXPECT_THROW(inputs.run("cpu_adaptive", 0), Error);
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

TEST(TileRule, GetsMoreCarefulWithTheLevelAndTheBudget) {
  for (int level = 1; level < kRuleLevels; ++level) {
    EXPECT_LT(rule_for_budget(0.1, level).screen, rule_for_budget(0.1, level - 1).screen);
    EXPECT_LT(rule_for_budget(0.1, level).drop, rule_for_budget(0.1, level - 1).drop);
  }
  EXPECT_LT(rule_for_budget(0.01, 0).screen, rule_for_budget(0.1, 0).screen);
  EXPECT_LT(rule_for_budget(1e9, 0).screen, 0) << "however large the budget, a row's best tile stays";
}

TEST(WorkShare, CountsScoresValuesAndTheScreen) {
  EXPECT_DOUBLE_EQ(work_share({.visible = 100, .high = 100}, 0), 1);
  EXPECT_DOUBLE_EQ(work_share({.visible = 100, .left_out = 100}, 0.125), 0.0625);
  EXPECT_DOUBLE_EQ(work_share({.visible = 100, .left_out = 40, .summarised = 50, .high = 10}, 0), 0.35);
  EXPECT_DOUBLE_EQ(work_share({}, 0.125), 1);
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
  cpu::lay_out_screen(args, sizes);
  cpu::lay_out_screen_thread(args, sizes);
  std::vector<double> memory(sizes.bytes() / 8 + 8);
  const auto base = reinterpret_cast<std::uintptr_t>(memory.data());
  Scratch scratch(reinterpret_cast<void*>((base + 63) / 64 * 64));
  const cpu::Screen screen = cpu::lay_out_screen(args, scratch);
  cpu::build_screen(args, 0, 0, cpu::lay_out_screen_thread(args, scratch), screen);
  EXPECT_TRUE(*screen.finite);
  EXPECT_NEAR(*screen.energy, 1, 1e-4);  // FP32 Gram matrices of 300 rows, squared again in the energy

  std::vector<double> mean(kDim, 0.0);
  for (std::size_t i = 0; i < kTokens; ++i)
    for (std::size_t c = 0; c < kDim; ++c) mean[c] += k[i * kDim + c] / static_cast<double>(kTokens);
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < 32; ++i)
    for (std::size_t j = 0; j < kTokens; ++j) {
      double score = 0, screened = 0;
      for (std::size_t c = 0; c < kDim; ++c) score += q[i * kDim + c] * (k[j * kDim + c] - mean[c]);
      for (std::size_t r = 0; r < cpu::kScreenRank; ++r) {
        double along = 0;
        for (std::size_t c = 0; c < kDim; ++c)
          along += static_cast<double>(q[i * kDim + c]) * screen.z[c * cpu::kScreenRank + r];
        screened += along * screen.k[j * cpu::kScreenRank + r];
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
