// guarantee = bounded: the reported bound is at least the true error and at most the budget, whatever the data.
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
#include "common/error.h"
#include "plan/error_bound.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

enum class Data {
  kLocal,      // large scores near the diagonal alone
  kNormal,     // N(0, 1): nothing to summarise at tight budgets
  kSmooth,     // scores and v change slowly from key to key
  kOutliers,   // a few channels of q, k and v are 20 times as large
  kKeyBias,    // k has a common offset of 30 in every channel
  kPeaked,     // local with q times 2.5
  kSinks,      // the first four keys draw most of the mass
  kSpikes,     // single keys far away score highest for some queries
  kConstant,   // all rows of k and of v are equal
  kHuge,       // scores of +-100,000
  kValueBias,  // v has a common offset of 100
};

struct Variant {
  const char* name;
  Data data = Data::kLocal;
  std::int64_t query_heads = 2, key_heads = 2, queries = 1088, keys = 1088, dim = 32;
  bool causal = true;
  adaattn_alignment alignment = ADAATTN_TOP_LEFT;
  adaattn_dtype dtype = ADAATTN_FLOAT32;
  std::vector<std::int64_t> lengths = {};
};

float rounded(float value, adaattn_dtype dtype) {
  float stored = 0;
  store_element(&stored, 0, dtype, value);
  return load_element(&stored, 0, dtype);
}

class Inputs {
 public:
  explicit Inputs(const Variant& variant) : v_(variant) {
    Random random(17);
    const auto fill = [&](std::int64_t heads, std::int64_t tokens, auto value) {
      std::vector<float> values;
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t n = 0; n < tokens; ++n)
          for (std::int64_t c = 0; c < v_.dim; ++c) values.push_back(rounded(value(n, c), v_.dtype));
      return values;
    };
    const auto turning = [](std::int64_t n, std::int64_t c) {
      const double angle = static_cast<double>(n) * 0.004 * static_cast<double>(c / 2 + 1);
      return static_cast<float>(c % 2 == 0 ? std::cos(angle) : std::sin(angle));
    };
    const bool local = v_.data == Data::kLocal || v_.data == Data::kPeaked || v_.data == Data::kSpikes ||
                       v_.data == Data::kOutliers || v_.data == Data::kValueBias;
    const auto outlier = [&](std::int64_t c) { return v_.data == Data::kOutliers && c % 13 == 5 ? 20.0F : 1.0F; };
    q = fill(v_.query_heads, v_.queries, [&](std::int64_t n, std::int64_t c) {
      const float noise = random.normal();
      switch (v_.data) {
        case Data::kHuge: return 300 * noise;
        case Data::kSmooth: return 0.3F * turning(n, c);
        case Data::kSinks: return noise + 1;
        default: return local ? outlier(c) * (v_.data == Data::kPeaked ? 5 : 2) * turning(n, c) + 0.3F * noise : noise;
      }
    });
    k = fill(v_.key_heads, v_.keys, [&](std::int64_t n, std::int64_t c) {
      const float noise = random.normal();
      switch (v_.data) {
        case Data::kHuge: return 300 * noise;
        case Data::kSmooth: return turning(n, c);
        case Data::kSinks: return n < 4 ? 2.0F : noise;
        case Data::kKeyBias: return 30 + noise;
        case Data::kConstant: return static_cast<float>(c % 5) - 2;
        case Data::kSpikes: return n == 100 ? 2 * turning(900, c) : 2 * turning(n, c) + 0.3F * noise;
        default: return local ? outlier(c) * 2 * turning(n, c) + 0.3F * noise : noise;
      }
    });
    v = fill(v_.key_heads, v_.keys, [&](std::int64_t n, std::int64_t c) {
      const float noise = random.normal();
      switch (v_.data) {
        case Data::kSmooth: return turning(n, c) + 0.1F * noise;
        case Data::kConstant: return static_cast<float>(c % 3);
        case Data::kSpikes: return n == 100 ? 50 * noise : noise;
        case Data::kValueBias: return 100 + noise;
        default: return outlier(c) * noise;
      }
    });
  }

  struct Result {
    std::vector<float> out, lse, entropy, max_probability;
    std::vector<adaattn_head_report> reports;
    std::vector<std::uint8_t> classes;
  };

  Result run(double error, const char* kernel = "cpu_bounded", const adaattn_head_plan* plans = nullptr) {
    const auto rows = static_cast<std::size_t>(v_.query_heads * v_.queries);
    const auto panel = static_cast<std::int64_t>(adaattn_panel_rows());
    const auto heads = static_cast<std::size_t>(v_.query_heads);
    Result result{.out = std::vector<float>(rows * static_cast<std::size_t>(v_.dim), NAN),
                  .lse = std::vector<float>(rows, NAN),
                  .entropy = std::vector<float>(rows, NAN),
                  .max_probability = std::vector<float>(rows, NAN),
                  .reports = std::vector<adaattn_head_report>(heads),
                  .classes = std::vector<std::uint8_t>(
                      heads * static_cast<std::size_t>((v_.queries + panel - 1) / panel * ((v_.keys + 63) / 64)), 255)};
    std::vector<std::uint16_t> storage[4];
    ForwardArgs args = problem(storage, result.out);
    args.lse = result.lse.data();
    args.entropy = result.entropy.data();
    args.max_probability = result.max_probability.data();
    args.heads = result.reports.data();
    args.tile_classes = result.classes.data();
    args.plans = plans;
    args.options.error = error;
    args.options.guarantee = ADAATTN_BOUNDED;
    args.options.kernel = kernel;
    adaattn::forward(args);
    for (std::size_t x = 0; x < storage[3].size(); ++x)
      result.out[x] = load_element(storage[3].data(), static_cast<std::int64_t>(x), v_.dtype);
    return result;
  }

  struct Truth {
    std::vector<double> out, lse;
  };
  Truth truth() {
    const auto rows = static_cast<std::size_t>(v_.query_heads * v_.queries);
    Truth truth{.out = std::vector<double>(rows * static_cast<std::size_t>(v_.dim)), .lse = std::vector<double>(rows)};
    std::vector<std::uint16_t> storage[4];
    std::vector<float> out(truth.out.size());
    const ForwardArgs args = problem(storage, out);
    EXPECT_EQ(adaattn_reference_forward(&args, truth.out.data(), truth.lse.data()), ADAATTN_OK);
    return truth;
  }

  double error_of_head(const Result& got, const Truth& truth, std::int64_t head) const {
    double error = 0, norm = 0;
    const auto size = static_cast<std::size_t>(v_.queries * v_.dim), first = static_cast<std::size_t>(head) * size;
    for (std::size_t x = first; x < first + size; ++x) {
      error += (got.out[x] - truth.out[x]) * (got.out[x] - truth.out[x]);
      norm += truth.out[x] * truth.out[x];
    }
    return error == 0 ? 0 : std::sqrt(error / norm);
  }

  std::vector<float> q, k, v;

 private:
  ForwardArgs problem(std::vector<std::uint16_t>* storage, std::vector<float>& out) {
    const auto tensor = [&](std::vector<float>& values, std::int64_t count, std::int64_t tokens, int slot) {
      Tensor view = adaattn::view(values.data(), {1, count, tokens, v_.dim});
      if (v_.dtype == ADAATTN_FLOAT32) return view;
      storage[slot].resize(values.size());
      for (std::size_t x = 0; x < values.size(); ++x)
        store_element(storage[slot].data(), static_cast<std::int64_t>(x), v_.dtype, values[x]);
      view.data = storage[slot].data();
      view.dtype = v_.dtype;
      return view;
    };
    ForwardArgs args = forward_args(tensor(q, v_.query_heads, v_.queries, 0), tensor(k, v_.key_heads, v_.keys, 1),
                                    tensor(v, v_.key_heads, v_.keys, 2), tensor(out, v_.query_heads, v_.queries, 3));
    args.key_lengths = v_.lengths.empty() ? nullptr : v_.lengths.data();
    args.options.causal = v_.causal ? 1 : 0;
    args.options.alignment = v_.alignment;
    return args;
  }

  Variant v_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void PrintTo(const Variant& variant, std::ostream* stream) { *stream << variant.name; }

class Bounded : public ::testing::TestWithParam<Variant> {};

TEST_P(Bounded, TheBoundLiesBetweenTheErrorAndTheBudget) {
  const Variant& variant = GetParam();
  Inputs inputs(variant);
  const Inputs::Truth truth = inputs.truth();
  // Rounding to 16 bits, which neither budget nor bound count, moves every element by at most 2^-9 of itself.
  const double rounding = variant.dtype == ADAATTN_FLOAT32 ? 0 : 0x1p-9;
  const std::vector<std::int64_t> targets = hwy::SupportedAndGeneratedTargets();
  for (const std::int64_t target : targets) {
    const OnlyTarget only(target);
    for (const double error : {1e-1, 1e-2, 3e-2, 3e-3}) {
      if (target != targets.front() && error != 1e-1 && error != 1e-2) continue;  // the slow ones see two budgets
      const Inputs::Result got = inputs.run(error);
      for (std::int64_t h = 0; h < variant.query_heads; ++h) {
        const adaattn_head_report& report = got.reports[static_cast<std::size_t>(h)];
        const std::string where = concat(hwy::TargetName(target), ", head ", h, ", budget ", error);
        EXPECT_LE(inputs.error_of_head(got, truth, h), report.error_bound + rounding) << where;
        EXPECT_LE(report.error_bound, error) << where;
        EXPECT_EQ(report.tiles, report.high_tiles + report.summarised_tiles) << where;
        EXPECT_EQ(report.estimated_error, 0) << where;
      }
      for (std::size_t row = 0; row < got.lse.size(); ++row) {
        if (std::isinf(truth.lse[row])) {  // sees no key
          ASSERT_EQ(got.lse[row], truth.lse[row]);
          continue;
        }
        // No mass is left out: float32 rounding alone, of scores of up to 1e5 where they are huge.
        ASSERT_NEAR(got.lse[row], truth.lse[row], 1e-5 + 2e-6 * std::fabs(truth.lse[row])) << row;
      }
    }
  }
}

std::string variant_name(const ::testing::TestParamInfo<Variant>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(
    Heads, Bounded,
    ::testing::Values(
        Variant{.name = "local"}, Variant{.name = "full", .causal = false},
        Variant{.name = "normal", .data = Data::kNormal},
        Variant{.name = "smooth", .data = Data::kSmooth, .causal = false},
        Variant{.name = "outliers", .data = Data::kOutliers}, Variant{.name = "key_bias", .data = Data::kKeyBias},
        Variant{.name = "peaked", .data = Data::kPeaked}, Variant{.name = "sinks", .data = Data::kSinks},
        Variant{.name = "spikes", .data = Data::kSpikes}, Variant{.name = "constant", .data = Data::kConstant},
        Variant{.name = "huge", .data = Data::kHuge}, Variant{.name = "value_bias", .data = Data::kValueBias},
        Variant{.name = "grouped", .query_heads = 4, .key_heads = 2},
        Variant{.name = "odd_sizes", .queries = 1061, .keys = 1099, .dim = 41, .causal = false},
        Variant{.name = "after_a_cache", .queries = 1030, .keys = 1500, .alignment = ADAATTN_BOTTOM_RIGHT},
        Variant{.name = "rows_without_keys", .queries = 1400, .keys = 1100, .alignment = ADAATTN_BOTTOM_RIGHT},
        Variant{.name = "key_length", .keys = 1300, .lengths = {1031}},
        Variant{.name = "no_keys_at_all", .lengths = {0}}, Variant{.name = "bfloat16", .dtype = ADAATTN_BFLOAT16},
        Variant{.name = "float16", .dtype = ADAATTN_FLOAT16},
        Variant{.name = "below_a_tile", .data = Data::kNormal, .queries = 40, .keys = 33},
        Variant{.name = "one_query", .data = Data::kNormal, .queries = 1, .keys = 300, .causal = false},
        Variant{
            .name = "small_bfloat16", .data = Data::kNormal, .queries = 130, .keys = 200, .dtype = ADAATTN_BFLOAT16}),
    variant_name);

TEST(BoundedForm, SummarisesTilesWhereThatIsAllowed) {
  Inputs inputs({.name = "smooth", .data = Data::kSmooth, .causal = false});
  const Inputs::Result loose = inputs.run(0.1), tight = inputs.run(0.003);
  EXPECT_EQ(loose.reports[0].plan.form, ADAATTN_TILED);
  EXPECT_GT(loose.reports[0].summarised_tiles, loose.reports[0].tiles / 4);
  EXPECT_GT(loose.reports[0].summarised_tiles, tight.reports[0].summarised_tiles);
  EXPECT_LT(loose.reports[0].work, 1);
}

TEST(BoundedForm, ClassesCountUpToTheReport) {
  Inputs inputs({.name = "local"});
  const Inputs::Result got = inputs.run(0.1);
  std::int64_t high = 0, summarised = 0;
  for (std::size_t i = 0; i < got.classes.size() / 2; ++i) {
    ASSERT_TRUE(got.classes[i] == ADAATTN_TILE_HIDDEN || got.classes[i] == ADAATTN_TILE_HIGH ||
                got.classes[i] == ADAATTN_TILE_SUMMARISED)
        << i;
    high += static_cast<std::int64_t>(got.classes[i] == ADAATTN_TILE_HIGH);
    summarised += static_cast<std::int64_t>(got.classes[i] == ADAATTN_TILE_SUMMARISED);
  }
  EXPECT_EQ(high, got.reports[0].high_tiles);
  EXPECT_EQ(summarised, got.reports[0].summarised_tiles);
}

TEST(BoundedForm, ClassesOfDenseHeadsSayWhatIsSeen) {
  Inputs inputs({.name = "normal", .data = Data::kNormal});
  const Inputs::Result got = inputs.run(1e-3);
  ASSERT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  const auto panel = static_cast<std::size_t>(adaattn_panel_rows());
  for (std::size_t p = 0; p < 1088 / panel; ++p)
    for (std::size_t tile = 0; tile < 17; ++tile)
      ASSERT_EQ(got.classes[p * 17 + tile],
                tile * 64 <= p * panel + panel - 1 ? ADAATTN_TILE_HIGH : ADAATTN_TILE_HIDDEN)
          << p << " " << tile;
}

TEST(BoundedForm, EntropyAndLargestProbabilityCountEveryKey) {
  Inputs inputs({.name = "local"});
  const Inputs::Result got = inputs.run(0.1), exact = inputs.run(0, "cpu_flash");
  ASSERT_EQ(got.reports[0].plan.form, ADAATTN_TILED);
  for (std::size_t row = 0; row < got.entropy.size(); ++row) {
    ASSERT_NEAR(got.entropy[row], exact.entropy[row], 2e-5);
    ASSERT_NEAR(got.max_probability[row], exact.max_probability[row], 1e-5);
  }
}

TEST(BoundedForm, IsTheSameForAnyRun) {
  Inputs inputs({.name = "local"});
  EXPECT_TRUE(same_bits(inputs.run(0.03).out, inputs.run(0.03).out));
}

TEST(BoundedForm, DenseHeadsAreThoseOfTheExactKernel) {
  Inputs inputs({.name = "normal", .data = Data::kNormal});
  const Inputs::Result got = inputs.run(1e-3);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_TRUE(same_bits(got.out, inputs.run(0, "cpu_flash").out));
}

// Scores of 100,000 are off by several units in float32: heads with such scores run in FP64, whatever the shape.
TEST(BoundedForm, HeadsThatFloat32CannotVouchForAreThoseOfTheReference) {
  const Variant variants[] = {
      {.name = "grouped", .data = Data::kHuge, .key_heads = 1, .queries = 75, .keys = 301, .dim = 30, .causal = false},
      {.name = "rows_without_keys",
       .data = Data::kHuge,
       .queries = 330,
       .keys = 300,
       .alignment = ADAATTN_BOTTOM_RIGHT},
      {.name = "bfloat16", .data = Data::kHuge, .queries = 90, .keys = 90, .dtype = ADAATTN_BFLOAT16},
      {.name = "length", .data = Data::kHuge, .queries = 64, .keys = 280, .causal = false, .lengths = {270}}};
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets())
    for (const Variant& variant : variants) {
      const OnlyTarget only(target);
      Inputs inputs(variant);
      const Inputs::Result got = inputs.run(1e-3), want = inputs.run(0, "reference_fp64");
      ASSERT_GT(got.reports[0].escalations, 0) << variant.name;
      ASSERT_LE(got.reports[0].error_bound, 1e-3) << variant.name;
      // Sums in another order are off by 1e-12 of scores of 100,000, and may tip a value that is rounded to be stored.
      const double ulp = variant.dtype == ADAATTN_FLOAT32 ? 0x1p-23 : 0x1p-7;
      for (std::size_t x = 0; x < got.out.size(); ++x)
        ASSERT_NEAR(got.out[x], want.out[x], ulp * std::abs(want.out[x]) + 1e-7) << variant.name << x;
      for (std::size_t row = 0; row < got.lse.size(); ++row) {
        if (std::isinf(want.lse[row])) {
          ASSERT_EQ(got.lse[row], want.lse[row]);
          continue;
        }
        ASSERT_NEAR(got.lse[row], want.lse[row], 2e-7 * std::abs(want.lse[row])) << variant.name;
        ASSERT_NEAR(got.entropy[row], want.entropy[row], 1e-6) << variant.name;
        ASSERT_NEAR(got.max_probability[row], want.max_probability[row], 1e-6) << variant.name;
      }
    }
}

// Four queries with scores of some 100,000, and two keys that share them: what float32 rounds there is over the budget,
// and no tile is to blame that could be run exactly instead.
TEST(BoundedForm, ThatFewRowsSpoilEndsInFP64) {
  Inputs inputs({.name = "local", .query_heads = 1, .key_heads = 1});
  constexpr std::size_t kDim = 32, kKey = 500;
  for (std::size_t c = 0; c < kDim; ++c)
    inputs.k[(kKey + 1) * kDim + c] = inputs.k[kKey * kDim + c] = 2 * inputs.k[kKey * kDim + c];
  for (const std::size_t query : {700, 732, 764, 796})
    for (std::size_t c = 0; c < kDim; ++c) inputs.q[query * kDim + c] = 1e4F * inputs.k[kKey * kDim + c];
  const Inputs::Result got = inputs.run(0.1);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_GT(got.reports[0].escalations, 1);
  EXPECT_LE(got.reports[0].error_bound, 0.1);
  EXPECT_LE(inputs.error_of_head(got, inputs.truth(), 0), got.reports[0].error_bound);
}

TEST(BoundedForm, FollowsAPlan) {
  Inputs inputs({.name = "local"});
  adaattn_head_plan plans[2] = {};
  plans[0].form = ADAATTN_DENSE;
  plans[1].form = ADAATTN_AUTOMATIC;
  const Inputs::Result got = inputs.run(0.1, "cpu_bounded", plans);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_EQ(got.reports[1].plan.form, ADAATTN_TILED);
  plans[1].form = ADAATTN_LOW_RANK;
  EXPECT_THROW(inputs.run(0.1, "cpu_bounded", plans), Error);
}

TEST(BoundedForm, HeadsWithNanOrInfinityRunAsExactly) {
  for (const auto which : {0, 1, 2}) {
    Inputs inputs({.name = "local"});
    std::vector<float>& spoilt = which == 0 ? inputs.q : which == 1 ? inputs.k : inputs.v;
    spoilt[77 * 32 + 5] = std::numeric_limits<float>::quiet_NaN();
    spoilt[900 * 32 + 6] = std::numeric_limits<float>::infinity();
    const Inputs::Result got = inputs.run(0.1), exact = inputs.run(0, "cpu_flash");
    EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE) << which;
    EXPECT_EQ(got.reports[0].error_bound, std::numeric_limits<double>::infinity()) << which;
    EXPECT_LE(got.reports[1].error_bound, 0.1) << which;
    const std::size_t size = got.out.size() / 2;
    EXPECT_EQ(std::memcmp(got.out.data(), exact.out.data(), size * sizeof(float)), 0) << which;
  }
}

TEST(BoundedForm, TilesOnlyWhereThatCanPay) {
  Inputs inputs({.name = "local"});
  EXPECT_THROW(inputs.run(0, "cpu_bounded"), Error);
  // Short sequences leave nothing to gain: dense, with a bound.
  const Inputs::Result got = inputs.run(0.1, nullptr);
  EXPECT_EQ(got.reports[0].plan.form, ADAATTN_DENSE);
  EXPECT_LE(got.reports[0].error_bound, 0.1);
  EXPECT_EQ(got.reports[0].work, 1);
}

TEST(ErrorBound, OfNoErrorIsNone) {
  EXPECT_EQ(relative_bound(0, 0), 0);
  EXPECT_EQ(relative_bound(1, 1), HUGE_VAL);
  EXPECT_DOUBLE_EQ(relative_bound(0.1, 1), 0.1 / 0.9);
  EXPECT_LT(relative_bound(planned_error(0.3), 1), 0.3);
}

TEST(ErrorBound, OneKeyWithAllTheMassNeedsNoExactScores) {
  const double spread = rounding_bound(1e5, 0.5, 1, 64, 256, kFloat32Unit);
  const double single = rounding_bound(1e5, 0, 1, 64, 256, kFloat32Unit);
  EXPECT_GT(spread, 0.1);
  EXPECT_LT(single, 1e-4);
}

}  // namespace
}  // namespace adaattn::testing
