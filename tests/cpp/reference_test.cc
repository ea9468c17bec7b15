// The FP64 reference against results known without it: closed forms, hand computation, difference quotients.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "expected.h"
#include "problem.h"

namespace adaattn::testing {
namespace {

struct Result {
  std::vector<double> out, lse;
};

Result reference(const ForwardArgs& args) {
  const std::int64_t rows = args.q.shape[0] * args.q.shape[1] * args.q.shape[2];
  Result result{std::vector<double>(rows * args.v.shape[3]), std::vector<double>(rows)};
  EXPECT_EQ(adaattn_reference_forward(&args, result.out.data(), result.lse.data()), ADAATTN_OK) << adaattn_last_error();
  return result;
}

// q = 0: every visible key weighs the same, so O is the mean of the visible values and LSE the log of their number.
TEST(Reference, UniformAttentionIsTheMeanOfTheValues) {
  const cases::Case c = {.name = "", .queries = 6, .keys = 6, .dim = 4, .causal = true};
  Problem problem(c);
  problem.q.fill([](auto...) { return 0.0f; });
  const Result got = reference(problem.forward_args());
  const std::vector<double> v = problem.v.values();
  for (std::int64_t h = 0; h < 2; ++h)
    for (std::int64_t i = 0; i < 6; ++i) {
      EXPECT_NEAR(got.lse[h * 6 + i], std::log(i + 1.0), 1e-15);
      for (std::int64_t d = 0; d < 4; ++d) {
        double mean = 0;
        for (std::int64_t j = 0; j <= i; ++j) mean += v[(h * 6 + j) * 4 + d] / (i + 1.0);
        EXPECT_NEAR(got.out[(h * 6 + i) * 4 + d], mean, 1e-15);
      }
    }
}

// A score 1,000 above the others leaves nothing to them: O is that key's value, LSE its score.
TEST(Reference, OneHotAttentionPicksOneValue) {
  const cases::Case c = {.name = "", .query_heads = 1, .key_heads = 1, .queries = 4, .keys = 4, .dim = 4, .scale = 1.0};
  Problem problem(c);
  problem.q.fill([](auto, auto, auto n, auto d) { return n == d ? 1000.0f : 0.0f; });
  problem.k.fill([](auto, auto, auto n, auto d) { return n == 3 - d ? 1.0f : 0.0f; });
  const Result got = reference(problem.forward_args());
  const std::vector<double> v = problem.v.values();
  for (std::int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(got.lse[i], 1000);
    for (std::int64_t d = 0; d < 4; ++d) EXPECT_EQ(got.out[i * 4 + d], v[(3 - i) * 4 + d]);
  }
}

// q = (1, 2), k = (1, -1), v = (10, 20), scale 1: scores 1, -1 and 2, -2; the second weighs 1/(1 + e^2) and 1/(1 +
// e^4).
TEST(Reference, TwoByTwoByHand) {
  const cases::Case c = {.name = "", .query_heads = 1, .key_heads = 1, .queries = 2, .keys = 2, .dim = 1};
  Problem problem(c);
  problem.q.fill([](auto, auto, auto n, auto) { return n == 0 ? 1.0f : 2.0f; });
  problem.k.fill([](auto, auto, auto n, auto) { return n == 0 ? 1.0f : -1.0f; });
  problem.v.fill([](auto, auto, auto n, auto) { return n == 0 ? 10.0f : 20.0f; });
  const Result got = reference(problem.forward_args());
  EXPECT_NEAR(got.out[0], 11.1920292202211755, 1e-13);
  EXPECT_NEAR(got.out[1], 10.1798620996209156, 1e-13);
  EXPECT_NEAR(got.lse[0], 1.1269280110429725, 1e-14);
  EXPECT_NEAR(got.lse[1], 2.0181499279178094, 1e-14);
}

TEST(Reference, FullyHiddenRowsAreZeroWithInfiniteLse) {
  const cases::Case c = {
      .name = "", .queries = 5, .keys = 3, .dim = 4, .causal = true, .alignment = ADAATTN_BOTTOM_RIGHT};
  const Result got = reference(Problem(c).forward_args());
  for (const std::int64_t i : {0, 1}) {  // before the first key
    EXPECT_EQ(got.lse[i], -std::numeric_limits<double>::infinity());
    for (std::int64_t d = 0; d < 4; ++d) EXPECT_EQ(got.out[i * 4 + d], 0);
  }
  EXPECT_TRUE(std::isfinite(got.lse[2]));
}

// Two implementations of one definition: the library's reference and the tests' own, over every case.
TEST(Reference, AgreesWithTheTestsOwnDefinition) {
  for (const cases::Case& c : cases::correctness()) {
    if (c.dtype != ADAATTN_FLOAT32) continue;  // both read 16-bit inputs through one function, which has its own test
    Problem problem(c);
    const ForwardArgs args = problem.forward_args();
    const Expected& want = expect(c, problem, args, /*gradients=*/false);
    const Result got = reference(args);
    for (std::size_t x = 0; x < got.out.size(); ++x)
      ASSERT_NEAR(got.out[x], want.out.value[x], 1e-12) << c.name << " at " << x;
    for (std::size_t x = 0; x < got.lse.size(); ++x)
      ASSERT_TRUE(got.lse[x] == want.lse.value[x] || std::abs(got.lse[x] - want.lse.value[x]) < 1e-12) << c.name;
  }
}

// d/dx of sum(dout * out) by central differences in FP64. Inputs are float32, so the step is a power of two that
// float32 represents exactly; the quotient is off by O(step^2) and by FP64 rounding / step.
TEST(Reference, GradientsAreThoseOfDifferenceQuotients) {
  const std::vector<cases::Case> problems = {
      {.name = "plain", .queries = 4, .keys = 5, .dim = 3},
      {.name = "grouped_causal", .query_heads = 4, .queries = 5, .keys = 5, .dim = 2, .causal = true},
      {.name = "masked",
       .batch = 2,
       .queries = 4,
       .keys = 6,
       .dim = 3,
       .value_dim = 2,
       .mask = cases::MaskKind::kAdditiveFloat32,
       .key_lengths = true,
       .scale = 0.7},
  };
  for (const cases::Case& c : problems) {
    Problem problem(c);
    // Multiples of 2^-8 with a step of 2^-12 stay exact in float32.
    for (Buffer* input : {&problem.q, &problem.k, &problem.v}) {
      const std::vector<double> values = input->values();
      std::size_t x = 0;
      input->fill([&](auto...) { return static_cast<float>(std::round(values[x++] * 256) / 256); });
    }
    const BackwardArgs backward = problem.backward_args();
    std::vector<double> dq(problem.q.elements()), dk(problem.k.elements()), dv(problem.v.elements());
    ASSERT_EQ(adaattn_reference_backward(&backward, dq.data(), dk.data(), dv.data()), ADAATTN_OK);
    const std::vector<double> dout = problem.dout.values();
    const auto loss = [&] {
      const Result result = reference(problem.forward_args());
      double sum = 0;
      for (std::size_t x = 0; x < dout.size(); ++x) sum += dout[x] * result.out[x];
      return sum;
    };
    const auto check = [&](const char* name, Buffer& input, const std::vector<double>& gradient) {
      constexpr double kStep = 0x1p-12;
      const std::vector<double> values = input.values();
      for (std::size_t at = 0; at < gradient.size(); ++at) {
        double loss_at[2];
        for (const int side : {0, 1}) {
          std::size_t x = 0;
          input.fill([&](auto...) {
            const double moved = x == at ? (side == 0 ? -kStep : kStep) : 0;
            return static_cast<float>(values[x++] + moved);
          });
          loss_at[side] = loss();
        }
        // Third derivatives of these problems are of the order of 100: 100 step^2 / 6 = 1e-6.
        ASSERT_NEAR(gradient[at], (loss_at[1] - loss_at[0]) / (2 * kStep), 2e-6) << c.name << ", " << name << " " << at;
      }
      std::size_t x = 0;
      input.fill([&](auto...) { return static_cast<float>(values[x++]); });
    };
    check("dq", problem.q, dq);
    check("dk", problem.k, dk);
    check("dv", problem.v, dv);
  }
}

TEST(Reference, TakesNullOutputs) {
  Problem problem({.name = ""});
  const ForwardArgs args = problem.forward_args();
  EXPECT_EQ(adaattn_reference_forward(&args, nullptr, nullptr), ADAATTN_OK);
}

}  // namespace
}  // namespace adaattn::testing
