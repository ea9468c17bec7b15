// The measure stage: closed forms, what it refuses, and that threads and instruction sets do not change it much.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "expected.h"
#include "problem.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

constexpr std::uint32_t kAll = (1U << ADAATTN_STATISTIC_COUNT) - 1;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Measured {
  std::vector<adaattn_head_statistics> heads;
  std::vector<double> gram_q, gram_k, core;
};

// Arguments of a sound call on a problem, with room for its results in measured.
MeasureArgs measure_args(const cases::Case& c, Problem& problem, Measured& measured, std::int64_t rows = 64,
                         std::int64_t sketch = 0) {
  const ForwardArgs forward = problem.forward_args();
  MeasureArgs args{};
  args.q = forward.q, args.k = forward.k, args.v = forward.v, args.mask = forward.mask;
  args.key_lengths = forward.key_lengths;
  args.options = forward.options;
  args.statistics = kAll;
  args.power_iterations = 1;
  args.sample_rows = rows;
  args.sketch = sketch;
  const auto heads = static_cast<std::size_t>(c.batch * c.query_heads), dim = static_cast<std::size_t>(c.dim);
  const std::int64_t sampled = std::min(rows, c.queries), core = sketch > 0 && sketch < sampled ? sketch : sampled;
  measured.heads.assign(heads, {});
  measured.gram_q.assign(heads * dim * dim, kNaN);
  measured.gram_k.assign(static_cast<std::size_t>(c.batch * c.key_heads) * dim * dim, kNaN);
  measured.core.assign(heads * static_cast<std::size_t>(core * core), kNaN);
  args.heads = measured.heads.data();
  args.gram_q = measured.gram_q.data();
  args.gram_k = measured.gram_k.data();
  args.softmax_core = measured.core.data();
  return args;
}

// Equal scores: a row that sees n keys has entropy log(n), and its softmax is 1 / n.
TEST(Measure, EqualScores) {
  const cases::Case c = {.name = "equal", .queries = 40, .keys = 40, .dim = 8, .causal = true};
  Problem problem(c);
  problem.q.fill([](auto...) { return 0.0F; });
  problem.v.fill([](auto...) { return 2.0F; });
  Measured got;
  measure(measure_args(c, problem, got));
  const adaattn_head_statistics& s = got.heads[0];
  double entropy = 0, peak = 0;
  for (int n = 1; n <= 40; ++n) entropy += std::log(n) / 40, peak += 1.0 / n / 40;
  EXPECT_EQ(s.sampled_rows, 40);
  // Sums of at most 40 ones are exact; the logarithm and the reciprocal are rounded in float64.
  EXPECT_NEAR(s.entropy, entropy, 1e-6);
  EXPECT_NEAR(s.max_probability, peak, 1e-6);
  EXPECT_NEAR(s.softmax_energy, 40 * peak, 1e-5);  // a row of n times 1 / n
  EXPECT_EQ(s.score_deviation, 0);
  EXPECT_EQ(s.score_range, 0);
  EXPECT_NEAR(s.output_norm, 2 * std::sqrt(8.0), 1e-5);
  EXPECT_EQ(s.largest_q, 0);
  EXPECT_TRUE(std::isnan(s.crest_q));
  EXPECT_EQ(s.largest_v, 2);
  EXPECT_DOUBLE_EQ(s.crest_v, 1);
  EXPECT_EQ(s.outliers_v, 0);
  for (const double x : got.gram_q) EXPECT_EQ(x, 0);
  for (std::size_t i = 0; i < 40; ++i)  // rows with i + 1 and j + 1 entries have min(i, j) + 1 in common
    for (std::size_t j = 0; j < 40; ++j)
      EXPECT_NEAR(got.core[i * 40 + j], 1 / (1.0 + static_cast<double>(std::max(i, j))), 1e-6);
}

TEST(Measure, Magnitudes) {
  const cases::Case c = {.name = "magnitudes", .queries = 300, .keys = 300, .dim = 16};
  Problem problem(c);
  problem.q.fill([](auto, auto, auto n, auto d) {
    return n == 7 && d == 3 ? -50.0F : (n + d) % 2 == 0 ? 1.0F : -1.0F;
  });
  problem.k.fill([](auto...) { return 3.0F; });
  Measured got;
  measure(measure_args(c, problem, got));
  const adaattn_head_statistics& s = got.heads[0];
  EXPECT_EQ(s.largest_q, 50);
  EXPECT_DOUBLE_EQ(s.crest_q, 50 / std::sqrt((300 * 16 - 1 + 2500) / (300.0 * 16)));
  EXPECT_DOUBLE_EQ(s.outliers_q, 1 / (300.0 * 16));
  EXPECT_DOUBLE_EQ(s.key_mean, 1);  // all keys are the mean
  EXPECT_EQ(s.outliers_k, 0);
  for (const double x : got.gram_k) EXPECT_EQ(x, 0);
}

TEST(Measure, EveryInstructionSetAndAnyThreadsAgree) {
  const cases::Case c = {.name = "sets",
                         .batch = 2,
                         .query_heads = 4,
                         .key_heads = 2,
                         .queries = 150,
                         .keys = 530,
                         .dim = 24,
                         .value_dim = 40,
                         .key_lengths = true};
  Problem problem(c);
  for (const std::int64_t sketch : {0, 12}) {
    Measured first;
    measure(measure_args(c, problem, first, 70, sketch));
    for (const std::int64_t id : hwy::SupportedAndGeneratedTargets()) {
      const OnlyTarget only(id);
      const std::string target = hwy::TargetName(id);
      Measured one, three;
      MeasureArgs args = measure_args(c, problem, one, 70, sketch);
      args.options.num_threads = 1;
      measure(args);
      args = measure_args(c, problem, three, 70, sketch);
      args.options.num_threads = 3;
      measure(args);
      EXPECT_EQ(one.core, three.core) << target;
      EXPECT_EQ(one.gram_q, three.gram_q) << target;
      for (std::size_t h = 0; h < one.heads.size(); ++h) {
        EXPECT_EQ(std::memcmp(&one.heads[h], &three.heads[h], sizeof(one.heads[h])), 0) << target;
        // Float32 sums of at most 256 terms in another order: 256 * 2^-24 of their size, entropy being at most 7.
        if (first.heads[h].sampled_rows != 0) {
          EXPECT_NEAR(one.heads[h].entropy, first.heads[h].entropy, 7 * 256 * 0x1p-24) << target;
        }
        for (int i = 0; i < ADAATTN_STATISTIC_COUNT; ++i) EXPECT_EQ(one.heads[h].work[i], first.heads[h].work[i]);
      }
    }
  }
}

TEST(Measure, WithoutKeysOrValuesThereIsNothing) {
  const cases::Case c = {.name = "nothing", .batch = 2, .queries = 9, .keys = 30, .dim = 4, .key_lengths = true};
  Problem problem(c);  // the first batch entry, two heads, has no keys
  Measured got;
  MeasureArgs args = measure_args(c, problem, got);
  args.v.data = nullptr;
  measure(args);
  const auto& s = got.heads;
  EXPECT_EQ(s[0].sampled_rows, 0);
  EXPECT_TRUE(std::isnan(s[0].entropy) && std::isnan(s[0].largest_k) && std::isnan(s[3].output_norm));
  EXPECT_TRUE(std::isnan(s[3].largest_v));
  EXPECT_FALSE(std::isnan(s[3].entropy) || std::isnan(s[3].largest_k));
  for (const double x : got.core) EXPECT_FALSE(std::isnan(x));
}

TEST(Measure, NaNStaysInItsHead) {
  const cases::Case c = {.name = "nan", .query_heads = 2, .key_heads = 2, .queries = 9, .keys = 30, .dim = 4};
  Problem problem(c);
  problem.k.fill([](auto, auto h, auto n, auto d) { return h == 1 && n == 5 && d == 0 ? std::nanf("") : 1.0F; });
  Measured got;
  measure(measure_args(c, problem, got, 64, 3));
  EXPECT_FALSE(std::isnan(got.heads[0].entropy));
  EXPECT_TRUE(std::isnan(got.heads[1].entropy) && std::isnan(got.heads[1].largest_k));
  EXPECT_TRUE(std::isnan(got.heads[1].score_range) && std::isnan(got.heads[1].softmax_energy));
}

TEST(Measure, Refusals) {
  const cases::Case c = {.name = "refusals", .queries = 9, .keys = 30, .dim = 4};
  Problem problem(c);
  Measured got;
  const MeasureArgs sound = measure_args(c, problem, got);
  const auto refused = [&](const std::string& want, const std::function<void(MeasureArgs&)>& spoil) {
    MeasureArgs args = sound;
    spoil(args);
    try {
      measure(args);
      ADD_FAILURE() << "was taken: " << want;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(want), std::string::npos) << error.what();
    }
  };
  refused("statistics is 0, must be", [](auto& a) { a.statistics = 0; });
  refused("statistics is 32, must be", [](auto& a) { a.statistics = 32; });
  refused("sample_rows is 0, must be in 1..4096", [](auto& a) { a.sample_rows = 0; });
  refused("sample_rows is 4097", [](auto& a) { a.sample_rows = 4097; });
  refused("sketch is -1, must be in 0..1024", [](auto& a) { a.sketch = -1; });
  refused("power_iterations is 17, must be in 0..16", [](auto& a) { a.power_iterations = 17; });
  refused("heads is NULL", [](auto& a) { a.heads = nullptr; });
  refused("gram_q is NULL", [](auto& a) { a.gram_q = nullptr; });
  refused("gram_k is NULL", [](auto& a) { a.gram_k = nullptr; });
  refused("softmax_core is NULL", [](auto& a) { a.softmax_core = nullptr; });
  refused("k.shape is", [](auto& a) { a.k.shape[3] = 5; });
  refused("options.scale", [](auto& a) { a.options.has_scale = 1, a.options.scale = kNaN; });
  refused("at most 2^42 sampled scores", [](auto& a) {
    a.k.shape[2] = a.v.shape[2] = std::int64_t{1} << 38;
    a.k.stride[2] = a.v.stride[2] = 0;
  });
  refused("measure takes cpu tensors only",
          [](auto& a) { a.q.device = a.k.device = a.v.device = a.mask.device = ADAATTN_CUDA; });
  refused("workspace has 64 bytes", [](auto& a) {
    alignas(64) static std::byte small[64];
    a.workspace = small;
    a.workspace_bytes = sizeof(small);
  });
}

}  // namespace
}  // namespace adaattn::testing
