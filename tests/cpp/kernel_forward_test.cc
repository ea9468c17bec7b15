// Every forward kernel on every instruction set against the definition, for every case.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "expected.h"
#include "problem.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

// Runs the kernel, or returns false if it declines the case (then it must say why).
[[nodiscard]] bool run(const Candidate& candidate, ForwardArgs args) {
  args.options.kernel = candidate.kernel;
  const OnlyTarget only(candidate.target);
  try {
    adaattn::forward(args);
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), ADAATTN_UNSUPPORTED) << error.what();
    EXPECT_NE(std::string(error.what()).find(candidate.kernel), std::string::npos) << error.what();
    return false;
  }
}

class ForwardKernelTest : public ::testing::TestWithParam<KernelCase> {};

TEST_P(ForwardKernelTest, IsWithinItsBounds) {
  const auto& [candidate, c] = GetParam();
  Problem problem(c);
  ForwardArgs args = problem.forward_args();
  const bool plain = run(candidate, args);
  const std::vector<double> without_statistics = problem.out.values();
  if (plain) {
    EXPECT_EQ(problem.out.complaint(), "");
    EXPECT_EQ(problem.lse.complaint(), "");
  }
  problem.out.poison();
  problem.lse.poison();
  args.entropy = Problem::floats(problem.entropy);
  args.max_probability = Problem::floats(problem.max_probability);
  const bool with_statistics = run(candidate, args);
  if (!plain && !with_statistics) GTEST_SKIP() << candidate.kernel << " declines " << c.name;

  const Expected& want = expect(c, problem, args, /*gradients=*/false);
  const std::int64_t out_head = c.queries * c.dv();
  if (plain) {
    EXPECT_EQ(complaint("out", want.out, without_statistics, out_head), "");
  }
  if (!with_statistics) return;
  EXPECT_EQ(problem.out.complaint(), "");
  EXPECT_EQ(problem.lse.complaint(), "");
  EXPECT_EQ(problem.entropy.complaint(), "");
  EXPECT_EQ(problem.max_probability.complaint(), "");
  EXPECT_EQ(complaint("out", want.out, problem.out.values(), out_head), "");
  EXPECT_EQ(complaint("lse", want.lse, problem.lse.values(), c.queries), "");
  EXPECT_EQ(complaint("entropy", want.entropy, problem.entropy.values(), c.queries), "");
  EXPECT_EQ(complaint("max_probability", want.max_probability, problem.max_probability.values(), c.queries), "");
}

INSTANTIATE_TEST_SUITE_P(Correctness, ForwardKernelTest,
                         ::testing::Combine(::testing::ValuesIn(candidates(forward_kernels())),
                                            ::testing::ValuesIn(cases::correctness())),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Corner, ForwardKernelTest,
                         ::testing::Combine(::testing::ValuesIn(candidates(forward_kernels())),
                                            ::testing::ValuesIn(cases::corner())),
                         case_name);

class ForwardPropertyTest : public ::testing::TestWithParam<KernelCase> {
 protected:
  const Candidate& candidate() const { return std::get<0>(GetParam()); }
  const cases::Case& the_case() const { return std::get<1>(GetParam()); }
};

// Right for any number of threads, and the same bits on every run with one number of them.
TEST_P(ForwardPropertyTest, RepeatsItsBitsOnAnyNumberOfThreads) {
  Problem problem(the_case());
  ForwardArgs args = problem.forward_args();
  const Expected& want = expect(the_case(), problem, args, /*gradients=*/false);
  for (const int threads : {1, 2, 3, 7}) {
    args.options.num_threads = threads;
    problem.out.poison();
    if (!run(candidate(), args)) GTEST_SKIP() << "declined";
    const std::vector<double> out = problem.out.values(), lse = problem.lse.values();
    EXPECT_EQ(complaint("out", want.out, out, the_case().queries * the_case().dv()), "") << threads << " threads";
    EXPECT_EQ(complaint("lse", want.lse, lse, the_case().queries), "") << threads << " threads";
    problem.out.poison();
    ASSERT_TRUE(run(candidate(), args));
    EXPECT_EQ(problem.out.values(), out) << threads << " threads";
    EXPECT_EQ(problem.lse.values(), lse) << threads << " threads";
  }
}

// NaN in a value or key that no query sees does not count; one that is seen spoils just the rows that see it.
TEST_P(ForwardPropertyTest, KeepsHiddenNaNOut) {
  cases::Case c = the_case();
  c.causal = true;
  Problem problem(c);
  const std::int64_t bad = c.keys / 2;
  ForwardArgs args = problem.forward_args();
  if (!run(candidate(), args)) GTEST_SKIP() << "declined";
  const std::vector<double> before = problem.out.values();
  for (Buffer* buffer : {&problem.k, &problem.v}) {
    const std::vector<double> clean = buffer->values();
    std::size_t x = 0;
    buffer->fill([&](auto, auto, auto n, auto) {
      const auto kept = static_cast<float>(clean[x++]);
      return n == bad ? std::numeric_limits<float>::quiet_NaN() : kept;
    });
    problem.out.poison();
    ASSERT_TRUE(run(candidate(), args));
    const std::vector<double> out = problem.out.values();
    for (std::size_t at = 0; at < out.size(); ++at) {
      const auto query = static_cast<std::int64_t>(at) / c.dv() % c.queries;
      if (query < bad)
        ASSERT_EQ(out[at], before[at]) << "query " << query << " does not see the NaN";
      else
        ASSERT_TRUE(std::isnan(out[at])) << "query " << query << " sees the NaN";
    }
    x = 0;
    buffer->fill([&](auto...) { return static_cast<float>(clean[x++]); });
  }
}

// An infinite score: +inf makes the row NaN (inf - inf), as in torch; a key at -inf gets no weight.
TEST_P(ForwardPropertyTest, TakesInfiniteKeysAsSdpaDoes) {
  cases::Case c = the_case();
  c.query_heads = c.key_heads = 1;
  Problem problem(c);
  problem.q.fill([](auto...) { return 1.0f; });
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {infinity, -infinity}) {
    problem.k.fill([&](auto, auto, auto n, auto d) { return n == 3 && d == 0 ? value : 0.25f; });
    problem.out.poison();
    if (!run(candidate(), problem.forward_args())) GTEST_SKIP() << "declined";
    const std::vector<double> out = problem.out.values(), v = problem.v.values();
    for (std::int64_t d = 0; d < c.dv(); ++d) {
      if (value > 0) {
        EXPECT_TRUE(std::isnan(out[static_cast<std::size_t>(d)]));
        continue;
      }
      double mean = 0, size = 0;
      for (std::int64_t j = 0; j < c.keys; ++j)
        if (j != 3) mean += v[j * c.dv() + d] / static_cast<double>(c.keys - 1), size += std::abs(v[j * c.dv() + d]);
      EXPECT_NEAR(out[static_cast<std::size_t>(d)], mean,
                  (c.dtype == ADAATTN_FLOAT32 ? 0x1p-20 : 0x1p-11) * size / static_cast<double>(c.keys - 1));
    }
  }
}

// Keys at and after the key length are never read, so they may be anything.
TEST_P(ForwardPropertyTest, NeverReadsPadding) {
  cases::Case c = the_case();
  c.batch = 4;
  c.key_lengths = true;
  Problem problem(c);
  const ForwardArgs args = problem.forward_args();
  if (!run(candidate(), args)) GTEST_SKIP() << "declined";
  const std::vector<double> before = problem.out.values();
  for (Buffer* buffer : {&problem.k, &problem.v}) {
    const std::vector<double> clean = buffer->values();
    std::size_t x = 0;
    buffer->fill([&](auto b, auto, auto n, auto) {
      const auto kept = static_cast<float>(clean[x++]);
      return n < args.key_lengths[b] ? kept : std::numeric_limits<float>::quiet_NaN();
    });
  }
  problem.out.poison();
  ASSERT_TRUE(run(candidate(), args));
  EXPECT_EQ(problem.out.values(), before);
}

std::vector<cases::Case> property_cases() {
  return {{.name = "small", .dim = 32},
          {.name = "decode", .query_heads = 4, .queries = 1, .keys = 2000, .dim = 32},
          {.name = "few", .queries = 4, .keys = 40, .dim = 48},
          {.name = "half", .dim = 32, .dtype = ADAATTN_FLOAT16},
          {.name = "tiles", .query_heads = 4, .queries = 200, .keys = 200, .dim = 48}};
}

INSTANTIATE_TEST_SUITE_P(Properties, ForwardPropertyTest,
                         ::testing::Combine(::testing::ValuesIn(candidates(forward_kernels())),
                                            ::testing::ValuesIn(property_cases())),
                         case_name);

}  // namespace
}  // namespace adaattn::testing
