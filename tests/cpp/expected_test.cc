// The checker itself: it accepts the FP64 reference, and finds the mistakes that kernels make.
#include "expected.h"

#include <gtest/gtest.h>

namespace adaattn::testing {
namespace {

const cases::Case kCase = {.name = "plain", .queries = 60, .keys = 60, .causal = true};

struct Setting {
  Problem problem{kCase};
  ForwardArgs args = problem.forward_args();
  Expected want;
  Setting() {
    adaattn::forward(args);
    want = expect(kCase, problem, args, /*gradients=*/true);
  }
  std::string check(const std::vector<double>& out) const {
    return complaint("out", want.out, out, kCase.queries * kCase.dim);
  }
};

TEST(Expected, AcceptsTheTruthAndNamesTheWorstElement) {
  const Setting setting;
  std::vector<double> out = setting.want.out.value;
  EXPECT_EQ(setting.check(out), "");
  out[5] += 1e-3;
  EXPECT_NE(setting.check(out).find("out[0 (head), 5]"), std::string::npos) << setting.check(out);
  out[5] = std::nan("");
  EXPECT_NE(setting.check(out), "");
  out.pop_back();
  EXPECT_NE(setting.check(out), "");
}

// Bounds that let everything pass would test nothing: FP32 has to be right to better than 1e-4.
TEST(Expected, HasTightBounds) {
  const Setting setting;
  const std::int64_t size = kCase.queries * kCase.dim;
  EXPECT_LT(head_error(setting.want.out, setting.want.out.value, 0, size).allowed, 5e-5);
  EXPECT_LT(head_error(setting.want.dq, setting.want.dq.value, 0, size).allowed, 8e-5);
  EXPECT_LT(head_error(setting.want.dk, setting.want.dk.value, 0, size).allowed, 8e-5);
  EXPECT_LT(head_error(setting.want.dv, setting.want.dv.value, 0, size).allowed, 5e-5);
}

// One key too many or too few on the diagonal, and a scale that is off by 1e-4.
TEST(Expected, FindsTypicalMistakes) {
  Setting setting;
  const auto with = [&](auto&& change) {
    ForwardArgs args = setting.args;
    change(args.options);
    setting.problem.out.poison();
    adaattn::forward(args);
    return setting.check(setting.problem.out.values());
  };
  EXPECT_EQ(with([](adaattn_options&) {}), "");
  EXPECT_NE(with([](adaattn_options& o) { o.causal = 0, o.window_right = 1; }), "");
  EXPECT_NE(with([](adaattn_options& o) { o.window_left = 58; }), "");
  EXPECT_NE(with([](adaattn_options& o) { o.has_scale = 1, o.scale = 0.125 * 1.0001; }), "");
}

}  // namespace
}  // namespace adaattn::testing
