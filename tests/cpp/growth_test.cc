// Rounding errors must not grow with the number of keys: one short query block on 131,072 of them, in float32.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "expected.h"
#include "problem.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

struct Truth {
  Problem problem;
  std::vector<double> out, lse;
};

// One short query block on so many keys, with its FP64 result; computed once for all kernels.
Truth& truth(std::int64_t keys) {
  static std::map<std::int64_t, Truth> known;
  const auto found = known.find(keys);
  if (found != known.end()) return found->second;
  const cases::Case c = {.name = "", .query_heads = 1, .key_heads = 1, .queries = 4, .keys = keys, .dim = 64};
  Truth t{Problem(c), {}, {}};
  // Values with a mean: where they cancel, the error is small against their size, but not against the output's.
  Random random(7);
  t.problem.v.fill([&](auto...) { return 1 + 0.5f * random.normal(); });
  t.out.resize(static_cast<std::size_t>(t.problem.out.elements()));
  t.lse.resize(static_cast<std::size_t>(t.problem.lse.elements()));
  const ForwardArgs args = t.problem.forward_args();
  EXPECT_EQ(adaattn_reference_forward(&args, t.out.data(), t.lse.data()), ADAATTN_OK);
  return known.emplace(keys, std::move(t)).first->second;
}

// The relative Frobenius error of the head.
double error_at(std::int64_t keys, const Candidate& candidate) {
  Truth& want = truth(keys);
  ForwardArgs args = want.problem.forward_args();
  args.options.kernel = candidate.kernel;
  const OnlyTarget only(candidate.target);
  adaattn::forward(args);
  const std::vector<double> out = want.problem.out.values(), lse = want.problem.lse.values();
  double error = 0, norm = 0;
  for (std::size_t x = 0; x < out.size(); ++x) {
    error += (out[x] - want.out[x]) * (out[x] - want.out[x]);
    norm += want.out[x] * want.out[x];
  }
  for (std::size_t x = 0; x < lse.size(); ++x)
    EXPECT_NEAR(lse[x], want.lse[x], 0x1p-24 * (16 + 4 * std::abs(want.lse[x])));
  return std::sqrt(error / norm);
}

class GrowthTest : public ::testing::TestWithParam<Candidate> {};

// Plain FP32 accumulation over n keys ends about sqrt(n) u wrong, or n u where all terms have one sign and each step
// rounds alike: 2e-5 to 8e-3 at n = 131,072. With compensated steps only the sum within a block remains.
TEST_P(GrowthTest, ErrorAt131072KeysIsThatOfAFewUnits) {
  const double small = error_at(1024, GetParam()), large = error_at(131072, GetParam());
  RecordProperty("error_1024", std::to_string(small));
  RecordProperty("error_131072", std::to_string(large));
  EXPECT_LT(large, 16 * 0x1p-24) << "at 1,024 keys it is " << small;
}

std::string candidate_name(const ::testing::TestParamInfo<Candidate>& info) { return name_of(info.param); }
INSTANTIATE_TEST_SUITE_P(Kernels, GrowthTest, ::testing::ValuesIn(candidates(forward_kernels())), candidate_name);

}  // namespace
}  // namespace adaattn::testing
