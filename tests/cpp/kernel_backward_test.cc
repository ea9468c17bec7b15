// Every backward kernel on every instruction set against the definition's gradients, for every case.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "expected.h"
#include "problem.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

[[nodiscard]] bool run(const Candidate& candidate, BackwardArgs args) {
  args.options.kernel = candidate.kernel;
  const OnlyTarget only(candidate.target);
  try {
    adaattn::backward(args);
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), ADAATTN_UNSUPPORTED) << error.what();
    EXPECT_NE(std::string(error.what()).find(candidate.kernel), std::string::npos) << error.what();
    return false;
  }
}

// O and LSE as a forward pass would hand them over, from the FP64 reference.
void fill_out_and_lse(Problem& problem) {
  ForwardArgs args = problem.forward_args();
  args.options.kernel = "reference_fp64";
  adaattn::forward(args);
}

class BackwardKernelTest : public ::testing::TestWithParam<KernelCase> {};

TEST_P(BackwardKernelTest, IsWithinItsBounds) {
  const auto& [candidate, c] = GetParam();
  Problem problem(c);
  fill_out_and_lse(problem);
  if (!run(candidate, problem.backward_args())) GTEST_SKIP() << candidate.kernel << " declines " << c.name;
  const Expected& want = expect(c, problem, problem.forward_args(), /*gradients=*/true);
  EXPECT_EQ(problem.dq.complaint(), "");
  EXPECT_EQ(problem.dk.complaint(), "");
  EXPECT_EQ(problem.dv.complaint(), "");
  EXPECT_EQ(complaint("dq", want.dq, problem.dq.values(), c.queries * c.dim), "");
  EXPECT_EQ(complaint("dk", want.dk, problem.dk.values(), c.keys * c.dim), "");
  EXPECT_EQ(complaint("dv", want.dv, problem.dv.values(), c.keys * c.dv()), "");
}

INSTANTIATE_TEST_SUITE_P(Correctness, BackwardKernelTest,
                         ::testing::Combine(::testing::ValuesIn(candidates(backward_kernels())),
                                            ::testing::ValuesIn(cases::correctness())),
                         case_name);
INSTANTIATE_TEST_SUITE_P(Corner, BackwardKernelTest,
                         ::testing::Combine(::testing::ValuesIn(candidates(backward_kernels())),
                                            ::testing::ValuesIn(cases::corner())),
                         case_name);

class BackwardPropertyTest : public ::testing::TestWithParam<KernelCase> {};

// The same bits, whatever the number of threads.
TEST_P(BackwardPropertyTest, IsTheSameForAnyNumberOfThreads) {
  const auto& [candidate, c] = GetParam();
  Problem problem(c);
  fill_out_and_lse(problem);
  BackwardArgs args = problem.backward_args();
  args.options.num_threads = 1;
  if (!run(candidate, args)) GTEST_SKIP() << "declined";
  const std::vector<double> dq = problem.dq.values(), dk = problem.dk.values(), dv = problem.dv.values();
  for (const int threads : {2, 3, 7}) {
    for (Buffer* buffer : {&problem.dq, &problem.dk, &problem.dv}) buffer->poison();
    args.options.num_threads = threads;
    ASSERT_TRUE(run(candidate, args));
    EXPECT_EQ(problem.dq.values(), dq) << threads << " threads";
    EXPECT_EQ(problem.dk.values(), dk) << threads << " threads";
    EXPECT_EQ(problem.dv.values(), dv) << threads << " threads";
  }
}

// Padding is never read, and its gradients are 0.
TEST_P(BackwardPropertyTest, NeverReadsPadding) {
  cases::Case c = std::get<1>(GetParam());
  const Candidate& candidate = std::get<0>(GetParam());
  c.batch = 4;
  c.key_lengths = true;
  Problem problem(c);
  fill_out_and_lse(problem);
  const BackwardArgs args = problem.backward_args();
  for (Buffer* buffer : {&problem.k, &problem.v}) {
    const std::vector<double> clean = buffer->values();
    std::size_t x = 0;
    buffer->fill([&](auto b, auto, auto n, auto) {
      const auto kept = static_cast<float>(clean[x++]);
      return n < args.key_lengths[b] ? kept : std::numeric_limits<float>::quiet_NaN();
    });
  }
  if (!run(candidate, args)) GTEST_SKIP() << "declined";
  for (const double x : problem.dq.values()) ASSERT_TRUE(std::isfinite(x));
  for (const Buffer* buffer : {&problem.dk, &problem.dv}) {
    const std::vector<double> gradient = buffer->values();
    const std::int64_t dim = buffer->tensor().shape[3];
    for (std::size_t x = 0; x < gradient.size(); ++x) {
      const auto key = static_cast<std::int64_t>(x) / dim % c.keys;
      const auto b = static_cast<std::int64_t>(x) / dim / c.keys / c.key_heads;
      if (key < args.key_lengths[b])
        ASSERT_TRUE(std::isfinite(gradient[x]));
      else
        ASSERT_EQ(gradient[x], 0) << "key " << key << " of batch entry " << b << " is padding";
    }
  }
}

std::vector<cases::Case> property_cases() {
  return {{.name = "small", .dim = 32},
          {.name = "tiles", .query_heads = 4, .queries = 150, .keys = 200, .dim = 48, .causal = true}};
}

INSTANTIATE_TEST_SUITE_P(Properties, BackwardPropertyTest,
                         ::testing::Combine(::testing::ValuesIn(candidates(backward_kernels())),
                                            ::testing::ValuesIn(property_cases())),
                         case_name);

}  // namespace
}  // namespace adaattn::testing
