// The account of what summaries and dropped tiles do, against the same sums in FP64 over the tiles that were reported.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "adaattn/attention.h"
#include "buffer.h"
#include "plan/ladder.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

constexpr std::int64_t kTokens = 1060, kDim = 32, kTiles = (kTokens + 63) / 64;
constexpr std::size_t kRows = kTokens, kElements = kTokens * kDim;

// One head of keys and queries on a curve in 12 dimensions, which a screen of rank 16 holds whole: scores are large
// near the diagonal. Values are random about a mean that turns, too.
struct Head {
  std::vector<float> q, k, v;

  Head() {
    Random random(5);
    for (std::int64_t token = 0; token < kTokens; ++token)
      for (std::int64_t c = 0; c < kDim; ++c) {
        const double angle = 0.005 * static_cast<double>(token * (c / 2 + 1)) + (c % 2 == 0 ? 1.5707963 : 0);
        const double on_curve = c < 12 ? 4 * std::pow(0.85, static_cast<double>(c / 2)) * std::sin(angle) : 0;
        q.push_back(static_cast<float>(on_curve));
        k.push_back(static_cast<float>(on_curve));
        v.push_back(static_cast<float>(std::sin(angle)) + random.normal());
      }
  }
};

struct Result {
  std::vector<float> out = std::vector<float>(kElements), summarised = std::vector<float>(kRows, -1),
                     omitted = std::vector<float>(kRows, -1);
  adaattn_head_report report{};
  std::vector<std::uint8_t> classes;
};

enum class Asks { kNothing, kMasses };

Result run(Head& head, const char* kernel, double error, const adaattn_head_plan* plan, Asks asks = Asks::kMasses,
           bool causal = true, bool with_classes = true) {
  Result result;
  const auto tensor = [](std::vector<float>& values) { return view(values.data(), {1, 1, kTokens, kDim}); };
  ForwardArgs args = forward_args(tensor(head.q), tensor(head.k), tensor(head.v), tensor(result.out));
  const std::int64_t lanes = adaattn_panel_rows();
  result.classes.assign(static_cast<std::size_t>((kTokens + lanes - 1) / lanes * kTiles), 0xFF);
  args.options.error = error;
  args.options.kernel = kernel;
  args.options.causal = causal ? 1 : 0;
  args.options.guarantee = std::string(kernel) == "cpu_bounded" ? ADAATTN_BOUNDED : ADAATTN_MEASURED;
  args.plans = plan;
  args.heads = &result.report;
  if (with_classes) args.tile_classes = result.classes.data();
  if (asks == Asks::kMasses) args.summarised_mass = result.summarised.data();
  if (asks == Asks::kMasses) args.omitted_mass = result.omitted.data();
  adaattn::forward(args);
  return result;
}

// The quantities of adaattn_head_report and the rows' masses, in FP64 from the definitions, for causal heads.
struct Expected {
  std::vector<double> summarised, omitted;
  double error;

  Expected(const Head& head, const std::vector<std::uint8_t>& classes) {
    const std::int64_t lanes = adaattn_panel_rows();
    std::vector<double> means(static_cast<std::size_t>(kTiles * kDim), 0.0);
    for (std::int64_t j = 0; j < kTokens; ++j)
      for (std::int64_t c = 0; c < kDim; ++c)
        means[static_cast<std::size_t>(j / 64 * kDim + c)] +=
            head.v[static_cast<std::size_t>(j * kDim + c)] /
            static_cast<double>(std::min<std::int64_t>(64, kTokens - j / 64 * 64));
    double errors = 0, norms = 0;
    for (std::int64_t i = 0; i < kTokens; ++i) {
      std::vector<double> out(kDim, 0.0), strays(kDim, 0.0), dropped(kDim, 0.0);
      double sum = 0, in_means = 0, left_out = 0, top = 0;
      std::vector<double> scores;
      for (std::int64_t j = 0; j <= i; ++j) {
        double dot = 0;
        for (std::int64_t c = 0; c < kDim; ++c)
          dot += static_cast<double>(head.q[static_cast<std::size_t>(i * kDim + c)]) *
                 head.k[static_cast<std::size_t>(j * kDim + c)];
        scores.push_back(dot / std::sqrt(static_cast<double>(kDim)));
        top = std::max(top, scores.back());
      }
      for (std::int64_t j = 0; j <= i; ++j) {
        const double p = std::exp(scores[static_cast<std::size_t>(j)] - top);
        const float* v = head.v.data() + j * kDim;
        const double* mean = means.data() + j / 64 * kDim;
        switch (classes[static_cast<std::size_t>(i / lanes * kTiles + j / 64)]) {
          case ADAATTN_TILE_DROPPED:
            left_out += p;
            for (std::size_t c = 0; c < kDim; ++c) dropped[c] += p * mean[c];
            break;
          case ADAATTN_TILE_SUMMARISED:
          case ADAATTN_TILE_SUMMARISED_LOW:
            sum += p, in_means += p;
            for (std::size_t c = 0; c < kDim; ++c) out[c] += p * mean[c], strays[c] += p * (v[c] - mean[c]);
            break;
          default:
            sum += p;
            for (std::size_t c = 0; c < kDim; ++c) out[c] += p * v[c];
        }
      }
      summarised.push_back(in_means / (sum + left_out));
      omitted.push_back(left_out / (sum + left_out));
      for (std::size_t c = 0; c < kDim; ++c) {
        const double error_of = (strays[c] + dropped[c] - left_out * out[c] / sum) / (sum + left_out);
        if (!is_accounted(i / lanes, (kTokens + lanes - 1) / lanes)) continue;
        errors += error_of * error_of;
        norms += out[c] / sum * out[c] / sum;
      }
    }
    error = std::sqrt(errors / norms);
  }
};

adaattn_head_plan tiled(std::int32_t high, std::int32_t low, float low_share) {
  adaattn_head_plan plan = dense_plan(high);
  plan.form = ADAATTN_TILED;
  plan.low_precision = low;
  plan.low = low_share;
  return plan;
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

struct Variant {
  const char* name;
  std::int32_t high, low;
  float low_share;
  double tolerance;  // relative, of masses and of the error
};

// Summaries of float32 scores are off by rounding: exponentials by 1e-6, and the error, a difference of p v and mass
// times mean that are up to a thousand times as large, by 1e-3. In bfloat16 a score of 10 is off by 10 * 2^-9 * sqrt(2
// / 12) and a mass, a sum over 64 keys, by no more than its worst key's, 2 %; in int8 by steps of a 254th of 4 in 12
// channels of q and k each, sqrt(2 * 12 / 12) * 4 * 4 / 127 / sqrt(32) = 3 %, as much again for errors that do not
// average out.
class Summaries : public ::testing::TestWithParam<Variant> {};
TEST_P(Summaries, AreAccountedAsInFP64) {
  const Variant& variant = GetParam();
  Head head;
  adaattn_head_plan plan = tiled(variant.high, variant.low, variant.low_share);
  plan.drop = 0.4F;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const Result got = run(head, "cpu_adaptive", 10, &plan);
    const Expected want(head, got.classes);
    ASSERT_GT(got.report.summarised_tiles, 20) << hwy::TargetName(target);
    ASSERT_GT(want.error, 3e-4);
    for (std::size_t row = 0; row < kRows; ++row) {
      ASSERT_NEAR(got.summarised[row], want.summarised[row], variant.tolerance * want.summarised[row] + 1e-7) << row;
      ASSERT_EQ(got.omitted[row], 0) << row;
    }
    EXPECT_NEAR(got.report.summarised_mass, mean(want.summarised), variant.tolerance * mean(want.summarised));
    EXPECT_EQ(got.report.omitted_mass, 0);
    EXPECT_NEAR(got.report.accounted_error, want.error, variant.tolerance * want.error) << hwy::TargetName(target);
  }
}
INSTANTIATE_TEST_SUITE_P(
    Precisions, Summaries,
    ::testing::Values(Variant{"float32", ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_FLOAT32, kNever, 1e-3},
                      Variant{"bfloat16", ADAATTN_PRECISION_BFLOAT16, ADAATTN_PRECISION_BFLOAT16, kNever, 4e-2},
                      Variant{"int8", ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_INT8, 0, 8e-2}),
    [](const auto& variant) { return variant.param.name; });

// The screen holds these scores but for its own rounding to int8, a 254th of the largest coordinate of q and of k, at
// most as much as above.
TEST(DroppedTiles, AreAccountedFromTheScreen) {
  Head head;
  adaattn_head_plan plan = tiled(ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_FLOAT32, kNever);
  plan.screen = -1;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const Result got = run(head, "cpu_adaptive", 10, &plan);
    const Expected want(head, got.classes);
    ASSERT_GT(got.report.dropped_tiles, 20) << hwy::TargetName(target);
    ASSERT_GT(mean(want.omitted), 1e-3);
    EXPECT_NEAR(got.report.omitted_mass, mean(want.omitted), 0.08 * mean(want.omitted)) << hwy::TargetName(target);
    EXPECT_EQ(got.report.summarised_mass, 0);
    EXPECT_NEAR(got.report.accounted_error, want.error, 0.08 * want.error) << hwy::TargetName(target);
    for (std::size_t row = 0; row < kRows; ++row)
      ASSERT_NEAR(got.omitted[row], want.omitted[row], 0.3 * want.omitted[row] + 1e-6) << row;
  }
}

TEST(Masses, ChangeNothingElse) {
  Head head;
  adaattn_head_plan plan = tiled(ADAATTN_PRECISION_BFLOAT16, ADAATTN_PRECISION_INT8, -0.5F);
  plan.screen = -4;
  plan.drop = 0.1F;
  for (plan.pooled = 0; plan.pooled < 2; ++plan.pooled) {
    const Result asked = run(head, "cpu_adaptive", 10, &plan);
    const Result plain = run(head, "cpu_adaptive", 10, &plan, Asks::kNothing);
    EXPECT_EQ(std::memcmp(asked.out.data(), plain.out.data(), kElements * sizeof(float)), 0);
    EXPECT_EQ(asked.classes, plain.classes);
    EXPECT_TRUE(std::isnan(plain.report.summarised_mass) && std::isnan(plain.report.omitted_mass));
    EXPECT_TRUE(std::isnan(plain.report.accounted_error));
    EXPECT_GT(asked.report.summarised_mass, 0);
    EXPECT_EQ(asked.report.omitted_mass > 0, plan.pooled == 0) << "pooled tiles count as summarised";
  }
}

TEST(Masses, AreZeroOfExactHeads) {
  Head head;
  for (const char* kernel : {"cpu_flash", "reference_fp64", "cpu_bounded", "cpu_adaptive"}) {
    const bool has_budget = std::string(kernel) == "cpu_bounded" || std::string(kernel) == "cpu_adaptive";
    const Result got = run(head, kernel, has_budget ? 1e-6 : 0, nullptr);
    for (std::size_t row = 0; row < kRows; ++row) {
      ASSERT_EQ(got.summarised[row], 0) << kernel;
      ASSERT_EQ(got.omitted[row], 0) << kernel;
    }
    EXPECT_EQ(got.report.summarised_mass, 0) << kernel;
    EXPECT_EQ(got.report.omitted_mass, 0) << kernel;
    EXPECT_EQ(got.report.accounted_error, 0) << kernel;
  }
}

TEST(Masses, AreNotKnownOfLowRankHeads) {
  Head head;
  const adaattn_head_plan plan = low_rank_plan(128);
  const Result got = run(head, "cpu_adaptive", 10, &plan, Asks::kMasses, false, false);
  ASSERT_EQ(got.report.plan.form, ADAATTN_LOW_RANK);
  EXPECT_TRUE(std::isnan(got.summarised[0]) && std::isnan(got.omitted[0]));
  EXPECT_TRUE(std::isnan(got.report.accounted_error) && std::isnan(got.report.omitted_mass));
}

TEST(Masses, OfBoundedHeadsAreThoseOfTheirSummaries) {
  Head head;
  adaattn_head_plan plan = dense_plan(ADAATTN_PRECISION_FLOAT32);
  plan.form = ADAATTN_AUTOMATIC;
  const Result got = run(head, "cpu_bounded", 0.9, &plan);
  const Expected want(head, got.classes);
  ASSERT_EQ(got.report.plan.form, ADAATTN_TILED);
  ASSERT_GT(mean(want.summarised), 1e-4);
  for (std::size_t row = 0; row < kRows; ++row) {
    ASSERT_NEAR(got.summarised[row], want.summarised[row], 1e-5 * want.summarised[row] + 1e-7) << row;
    ASSERT_EQ(got.omitted[row], 0);
  }
  EXPECT_NEAR(got.report.summarised_mass, mean(want.summarised), 1e-5 * mean(want.summarised));
  EXPECT_TRUE(std::isnan(got.report.accounted_error)) << "bounded heads have a bound";
}

TEST(Masses, AreRefusedOnOtherDevices) {
  std::vector<float> values(64), masses(8);
  ForwardArgs args = forward_args(view(values.data(), {1, 1, 8, 8}), view(values.data(), {1, 1, 8, 8}),
                                  view(values.data(), {1, 1, 8, 8}), view(values.data(), {1, 1, 8, 8}));
  for (Tensor* tensor : {&args.q, &args.k, &args.v, &args.out}) tensor->device = ADAATTN_CUDA;
  args.omitted_mass = masses.data();
  EXPECT_EQ(adaattn_forward(&args), ADAATTN_INVALID_ARGUMENT);
  EXPECT_NE(std::string(adaattn_last_error()).find("omitted_mass is given, but q is on cuda"), std::string::npos)
      << adaattn_last_error();
}

}  // namespace
}  // namespace adaattn::testing
