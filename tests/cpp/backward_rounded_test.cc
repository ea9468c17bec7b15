// Gradients of forward passes in low precision: their P is the forward pass's, and the gradient goes straight through
// the rounding.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "adaattn/attention.h"
#include "rounded_attention.h"
#include "targets.h"
#include "tiled_gradient_problem.h"

namespace adaattn::testing {
namespace {

struct Precisions {
  const char* name = "";
  std::int32_t high, low;
};
constexpr Precisions kPrecisions[] = {{"int8", ADAATTN_PRECISION_INT8, ADAATTN_PRECISION_INT8},
                                      {"bfloat16", ADAATTN_PRECISION_BFLOAT16, ADAATTN_PRECISION_BFLOAT16},
                                      {"float16", ADAATTN_PRECISION_FLOAT16, ADAATTN_PRECISION_FLOAT16},
                                      {"float8", ADAATTN_PRECISION_FLOAT8, ADAATTN_PRECISION_FLOAT8},
                                      {"bfloat16_int8", ADAATTN_PRECISION_BFLOAT16, ADAATTN_PRECISION_INT8},
                                      {"float32_bfloat16", ADAATTN_PRECISION_FLOAT32, ADAATTN_PRECISION_BFLOAT16},
                                      {"float16_float8", ADAATTN_PRECISION_FLOAT16, ADAATTN_PRECISION_FLOAT8}};

double relative_error(const std::vector<float>& got, const Values& want) {
  double error = 0, norm = 0;
  for (std::size_t x = 0; x < want.size(); ++x) {
    error += (got[x] - want[x]) * (got[x] - want[x]);
    norm += want[x] * want[x];
  }
  return std::sqrt(error / norm);
}

class BackwardRounded : public ::testing::TestWithParam<std::tuple<Shape, Precisions>> {};

// The second head is dense, the others are tiled with classes at random.
TEST_P(BackwardRounded, IsTheGradientStraightThroughTheRounding) {
  const auto& [s, precisions] = GetParam();
  Inputs inputs(s);
  for (std::size_t x = 0; x < inputs.k.size(); ++x) inputs.k[x] += static_cast<float>(x % 5);  // keys have a mean
  std::vector<adaattn_head_plan> plans(static_cast<std::size_t>(s.query_heads));
  for (std::size_t h = 0; h < plans.size(); ++h) {
    plans[h].form = h == 1 ? ADAATTN_DENSE : ADAATTN_TILED;
    plans[h].precision = precisions.high;
    plans[h].low_precision = precisions.low;
  }
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const std::int64_t panel = adaattn_panel_rows();
    const std::vector<std::uint8_t> classes = random_classes(s, panel);
    const RoundedAttention model(s, inputs, panel, classes, plans);
    // The out of heads with rounded tiles has P and V rounded, too: 1 % here. The gradient does not take it over.
    Values out = model.out;
    for (double& x : out) x *= 1.01;
    const Gradients got = run(s, inputs, out, model.lse, classes, plans, 2);
    // Scores up to 20 are known to 20 * 2^-23 or so in float32, P as well as they; dQ is a sum of differences that
    // leave a tenth of their terms. Scores without the rounding are off by 1e-3 and more.
    constexpr double kTolerance = 3e-5;
    EXPECT_LT(relative_error(got.q, model.dq), kTolerance) << hwy::TargetName(target);
    EXPECT_LT(relative_error(got.k, model.dk), kTolerance) << hwy::TargetName(target);
    EXPECT_LT(relative_error(got.v, model.dv), kTolerance) << hwy::TargetName(target);
    const Gradients again = run(s, inputs, out, model.lse, classes, plans, 2);
    EXPECT_EQ(got.q, again.q);
  }
}

std::string case_name_of(const ::testing::TestParamInfo<std::tuple<Shape, Precisions>>& info) {
  return std::string(std::get<0>(info.param).name) + "_" + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, BackwardRounded,
    ::testing::Combine(
        ::testing::Values(
            Shape{.name = "causal", .queries = 110, .dim = 23, .value_dim = 37},
            Shape{.name = "grouped", .query_heads = 4, .queries = 70, .keys = 260, .causal = false, .key_length = 170},
            Shape{.name = "one_tile", .queries = 20, .keys = 41}),
        ::testing::ValuesIn(kPrecisions)),
    case_name_of);

class ProbabilitiesOfRounded : public ::testing::TestWithParam<Precisions> {};

// A dO with a single 1 in a row makes that row's P a column of dV: the forward pass's LSE is that of the same scores
// if it adds up to 1.
TEST_P(ProbabilitiesOfRounded, AddUpToWhatTheForwardPassDividedBy) {
  const Precisions& precisions = GetParam();
  for (const bool causal : {true, false}) {
    const Shape s = {.name = "",
                     .query_heads = 4,
                     .key_heads = 2,
                     .queries = 230,
                     .keys = 331,
                     .dim = 23,
                     .value_dim = 64,
                     .causal = causal};
    Inputs inputs(s);
    const auto width = static_cast<std::size_t>(s.dim);
    const auto make_smooth = [&](std::vector<float>& x, std::int64_t tokens, float noise) {  // near keys score high
      for (std::size_t i = 0; i < x.size(); ++i) {
        const auto place = static_cast<double>(i / width % static_cast<std::size_t>(tokens));
        const double angle = 0.004 * place * static_cast<double>(i % width / 2 + 1);
        x[i] = 1.5F * static_cast<float>(i % 2 == 0 ? std::cos(angle) : std::sin(angle)) + noise * x[i];
      }
    };
    make_smooth(inputs.q, s.queries, 0.5F);
    make_smooth(inputs.k, s.keys, 0.5F);
    for (std::size_t i = 0; i < inputs.k.size(); ++i) inputs.k[i] += static_cast<float>(i % 3);
    const bool mixed = precisions.high != precisions.low;
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    const adaattn_head_plan plan = {.form = mixed ? ADAATTN_TILED : ADAATTN_DENSE,
                                    .precision = precisions.high,
                                    .low_precision = precisions.low,
                                    .pooled = 0,
                                    .rank = 0,
                                    .screen = mixed ? -3 : kNever,
                                    .low = mixed ? -1 : kNever,
                                    .drop = mixed ? 0.1F : 0};
    std::vector<adaattn_head_plan> plans(4, plan);
    plans[3].pooled = mixed ? 1 : 0;
    for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
      const OnlyTarget only(target);
      const std::int64_t panel = adaattn_panel_rows();
      std::vector<float> out(inputs.dout.size()), lse(static_cast<std::size_t>(s.query_heads * s.queries));
      std::vector<adaattn_head_report> reports(4);
      std::vector<std::uint8_t> classes(
          static_cast<std::size_t>(s.query_heads * ((s.queries + panel - 1) / panel) * ((s.keys + 63) / 64)));
      ForwardArgs args = forward_args(adaattn::view(inputs.q.data(), {1, s.query_heads, s.queries, s.dim}),
                                      adaattn::view(inputs.k.data(), {1, s.key_heads, s.keys, s.dim}),
                                      adaattn::view(inputs.v.data(), {1, s.key_heads, s.keys, s.value_dim}),
                                      adaattn::view(out.data(), {1, s.query_heads, s.queries, s.value_dim}));
      args.options = options_of(s);
      args.options.error = 100;  // every plan is accepted
      args.options.kernel = "cpu_adaptive";
      args.lse = lse.data();
      args.heads = reports.data();
      args.plans = plans.data();
      args.tile_classes = classes.data();
      adaattn::forward(args);
      std::array<int, 7> counts{};
      for (const std::uint8_t c : classes) ++counts.at(c);
      for (const std::int32_t c : {ADAATTN_TILE_LOW, ADAATTN_TILE_HIGH, ADAATTN_TILE_SUMMARISED_LOW,
                                   ADAATTN_TILE_POOLED, ADAATTN_TILE_DROPPED})
        EXPECT_TRUE(!mixed || counts.at(static_cast<std::size_t>(c)) > 0)
            << "class " << c << " on " << hwy::TargetName(target);

      // Column c of dO belongs to one of the two query heads of a key head, and to one row.
      const auto row_of = [&](std::int64_t c) { return c * (s.queries - 1) / (s.value_dim - 1); };
      inputs.dout.assign(inputs.dout.size(), 0.0F);
      for (std::int64_t h = 0; h < s.query_heads; ++h)
        for (std::int64_t c = h % 2; c < s.value_dim; c += 2)
          inputs.dout[static_cast<std::size_t>((h * s.queries + row_of(c)) * s.value_dim + c)] = 1;
      std::vector<adaattn_head_plan> ran;
      for (const adaattn_head_report& report : reports) {
        ASSERT_EQ(report.escalations, 0);
        ran.push_back(report.plan);
      }
      const Gradients got = run(s, inputs, wide(out), wide(lse), classes, ran, 2);
      // The forward pass sums exponentials by polynomials: 7.5e-5 off in int8, 2.6e-6 in bfloat16 (simd/exp2-inl.h).
      // The LSE and the exponents, up to 30, add some 30 * 2^-23. Float32 scores would be 1e-3 to 1e-1 off.
      const bool int8 = precisions.high == ADAATTN_PRECISION_INT8 || precisions.low == ADAATTN_PRECISION_INT8;
      const double tolerance = (int8 ? 7.5e-5 : 2.6e-6) + 5e-6;
      for (std::int64_t key_head = 0; key_head < s.key_heads; ++key_head)
        for (std::int64_t c = 0; c < s.value_dim; ++c) {
          double sum = 0;
          for (std::int64_t j = 0; j < s.keys; ++j)
            sum += got.v[static_cast<std::size_t>((key_head * s.keys + j) * s.value_dim + c)];
          ASSERT_NEAR(sum, 1, tolerance) << hwy::TargetName(target) << ", key head " << key_head << ", row "
                                         << row_of(c) << (causal ? ", causal" : "");
        }
    }
  }
}

std::string precisions_name(const ::testing::TestParamInfo<Precisions>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(All, ProbabilitiesOfRounded, ::testing::ValuesIn(kPrecisions), precisions_name);

}  // namespace
}  // namespace adaattn::testing
