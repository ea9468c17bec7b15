// Gradients of a tiled forward pass against difference quotients of an FP64 model of it, its classes held fixed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "adaattn/attention.h"
#include "common/error.h"
#include "common/visibility.h"
#include "targets.h"
#include "tiled_gradient_problem.h"

namespace adaattn::testing {
namespace {

// The function that a forward pass with these classes computes, from the definition: sum over dout * out.
class Model {
 public:
  Model(const Shape& shape, std::int64_t panel, const std::vector<std::uint8_t>& classes,
        const std::vector<adaattn_head_plan>& plans)
      : s_(shape), panel_(panel), classes_(classes), plans_(plans), visibility_(visibility_of(shape)) {}

  double operator()(const Values& q, const Values& k, const Values& v, const Values& dout, Values* out,
                    Values* lse) const {
    double total = 0;
    for (std::int64_t h = 0; h < s_.query_heads; ++h)
      for (std::int64_t i = 0; i < s_.queries; ++i) {
        const std::int64_t key_head = h / (s_.query_heads / s_.key_heads);
        const Row row = {.q = q.data() + (h * s_.queries + i) * s_.dim,
                         .k = k.data() + key_head * s_.keys * s_.dim,
                         .v = v.data() + key_head * s_.keys * s_.value_dim};
        Values o(static_cast<std::size_t>(s_.value_dim), 0.0);
        double sum = 0;
        for (std::int64_t tile = 0; tile < tiles(); ++tile) add_tile(row, h, i, tile, o, sum);
        for (std::int64_t c = 0; c < s_.value_dim; ++c) {
          const auto at = static_cast<std::size_t>((h * s_.queries + i) * s_.value_dim + c);
          const double value = sum > 0 ? o[static_cast<std::size_t>(c)] / sum : 0;
          total += dout[at] * value;
          if (out != nullptr) (*out)[at] = value;
        }
        if (lse != nullptr) (*lse)[static_cast<std::size_t>(h * s_.queries + i)] = std::log(sum);
      }
    return total;
  }

  std::int64_t tiles() const { return (s_.keys + 63) / 64; }

 private:
  struct Row {
    const double *q, *k, *v;
  };

  double score(const Row& row, std::int64_t first, std::int64_t count) const {  // with the mean of count keys
    double sum = 0;
    for (std::int64_t key = first; key < first + count; ++key)
      for (std::int64_t c = 0; c < s_.dim; ++c) sum += row.q[c] * row.k[key * s_.dim + c];
    return sum / static_cast<double>(count) / std::sqrt(static_cast<double>(s_.dim));
  }
  void add_mean(const Row& row, std::int64_t first, std::int64_t count, double mass, Values& o, double& sum) const {
    sum += mass;
    for (std::int64_t key = first; key < first + count; ++key)
      for (std::int64_t c = 0; c < s_.value_dim; ++c)
        o[static_cast<std::size_t>(c)] += mass * row.v[key * s_.value_dim + c] / static_cast<double>(count);
  }
  void add_tile(const Row& row, std::int64_t h, std::int64_t i, std::int64_t tile, Values& o, double& sum) const {
    const std::int64_t panels = (s_.queries + panel_ - 1) / panel_;
    std::uint8_t c = classes_[static_cast<std::size_t>((h * panels + i / panel_) * tiles() + tile)];
    if (plans_[static_cast<std::size_t>(h)].form == ADAATTN_DENSE) c = ADAATTN_TILE_HIGH;
    const std::int64_t first = tile * 64, end = std::min(first + 64, visibility_.key_count);
    if (c == ADAATTN_TILE_HIGH || c == ADAATTN_TILE_LOW) {
      for (std::int64_t key = first; key < end; ++key)
        if (sees(visibility_, i, key)) add_mean(row, key, 1, std::exp(score(row, key, 1)), o, sum);
    } else if (c == ADAATTN_TILE_SUMMARISED || c == ADAATTN_TILE_SUMMARISED_LOW) {
      double mass = 0;
      for (std::int64_t key = first; key < end; ++key) mass += std::exp(score(row, key, 1));
      add_mean(row, first, end - first, mass, o, sum);
    } else if (c == ADAATTN_TILE_POOLED) {
      for (std::int64_t pool = first; pool < first + 64; pool += 16)
        add_mean(row, pool, 16, 16 * std::exp(score(row, pool, 16)), o, sum);
    }
  }

  Shape s_;
  std::int64_t panel_;
  const std::vector<std::uint8_t>& classes_;
  const std::vector<adaattn_head_plan>& plans_;
  Visibility visibility_;
};

// Slopes of the model along random directions of one input against those that the gradient gives.
void expect_slopes(const Model& model, const Inputs& inputs, const Gradients& got, const std::string& where) {
  const Values q = wide(inputs.q), k = wide(inputs.k), v = wide(inputs.v), dout = wide(inputs.dout);
  Random random(31);
  for (int input = 0; input < 3; ++input) {
    const std::vector<float>& gradient = input == 0 ? got.q : input == 1 ? got.k : got.v;
    for (int direction = 0; direction < 4; ++direction) {
      Values step(gradient.size());
      double slope = 0, norm = 0, length = 0;
      for (std::size_t x = 0; x < step.size(); ++x) {
        step[x] = direction == 3 ? (x % 7 == 3 ? 1.0 : 0.0) : random.normal();
        slope += step[x] * gradient[x];
        norm += static_cast<double>(gradient[x]) * gradient[x];
        length += step[x] * step[x];
      }
      const auto at = [&](double t) {
        Values moved[3] = {q, k, v};
        for (std::size_t x = 0; x < step.size(); ++x) moved[input][x] += t * step[x];
        return model(moved[0], moved[1], moved[2], dout, nullptr, nullptr);
      };
      constexpr double kStep = 1e-4;
      const double quotient = (at(kStep) - at(-kStep)) / (2 * kStep);
      // Float32 rounding moves each gradient element by some 1e-6 of its row's size, in no common direction; the
      // quotient's own error, of third derivatives times 1e-8, is below that.
      EXPECT_NEAR(slope, quotient, 1e-5 * std::sqrt(norm * length)) << where << ", input " << input;
    }
  }
}

class BackwardTiled : public ::testing::TestWithParam<Shape> {};

TEST_P(BackwardTiled, IsTheSlopeOfTheForwardPass) {
  const Shape& s = GetParam();
  Inputs inputs(s);
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const OnlyTarget only(target);
    const std::int64_t panel = adaattn_panel_rows();
    const std::vector<std::uint8_t> classes = random_classes(s, panel);
    std::vector<adaattn_head_plan> plans(static_cast<std::size_t>(s.query_heads));
    for (std::size_t h = 0; h < plans.size(); ++h) plans[h].form = h == 1 ? ADAATTN_DENSE : ADAATTN_TILED;
    const Model model(s, panel, classes, plans);
    Values out(inputs.dout.size()), lse(static_cast<std::size_t>(s.query_heads * s.queries));
    model(wide(inputs.q), wide(inputs.k), wide(inputs.v), wide(inputs.dout), &out, &lse);
    const Gradients got = run(s, inputs, out, lse, classes, plans, 2);
    expect_slopes(model, inputs, got, hwy::TargetName(target));
    const Gradients again = run(s, inputs, out, lse, classes, plans, 2);
    EXPECT_EQ(got.k, again.k);
    if (s.key_length >= 0) {
      for (std::int64_t x = s.key_length * s.dim; x < s.keys * s.dim; ++x)
        ASSERT_EQ(got.k[static_cast<std::size_t>(x)], 0) << "padding";
    }
  }
}

std::string shape_name(const ::testing::TestParamInfo<Shape>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Shapes, BackwardTiled,
                         ::testing::Values(Shape{.name = "causal"}, Shape{.name = "full", .causal = false},
                                           Shape{.name = "grouped", .query_heads = 4, .causal = false},
                                           Shape{.name = "key_length", .keys = 260, .causal = false, .key_length = 170},
                                           Shape{.name = "one_tile", .queries = 20, .keys = 40}),
                         shape_name);

// The classes that a forward pass gives out are those that its backward pass reads.
TEST(BackwardTiledOfBounded, IsTheSlopeOfTheForwardPass) {
  const Shape s = {.name = "bounded", .queries = 1050, .keys = 1090, .dim = 16, .value_dim = 16};
  Inputs inputs(s);
  for (std::size_t x = 0; x < inputs.k.size(); ++x) {  // smooth keys and values: most tiles can be summarised
    const double angle = 0.004 * static_cast<double>(x / 16 % 1090) * static_cast<double>(x % 16 / 2 + 1);
    inputs.k[x] = static_cast<float>(x % 2 == 0 ? std::cos(angle) : std::sin(angle));
    inputs.v[x] = inputs.k[x] + 0.1F * inputs.v[x];
  }
  const std::int64_t panel = adaattn_panel_rows();
  std::vector<float> out(inputs.dout.size()), lse(2 * 1050);
  std::vector<adaattn_head_report> reports(2);
  std::vector<std::uint8_t> classes(static_cast<std::size_t>(2 * ((1050 + panel - 1) / panel) * 18));
  ForwardArgs args =
      forward_args(adaattn::view(inputs.q.data(), {1, 2, 1050, 16}), adaattn::view(inputs.k.data(), {1, 2, 1090, 16}),
                   adaattn::view(inputs.v.data(), {1, 2, 1090, 16}), adaattn::view(out.data(), {1, 2, 1050, 16}));
  args.options = options_of(s);
  args.options.error = 0.1;
  args.options.guarantee = ADAATTN_BOUNDED;
  args.options.kernel = "cpu_bounded";  // which leaves short sequences alone unless it is named
  args.lse = lse.data();
  args.heads = reports.data();
  args.tile_classes = classes.data();
  adaattn::forward(args);
  ASSERT_GT(reports[0].summarised_tiles, 20);
  const std::vector<adaattn_head_plan> plans = {reports[0].plan, reports[1].plan};
  const Model model(s, panel, classes, plans);
  const Gradients got = run(s, inputs, wide(out), wide(lse), classes, plans, 2);
  expect_slopes(model, inputs, got, "bounded");
}

TEST(BackwardTiledInput, IsChecked) {
  const Shape s = {.name = "small", .queries = 20, .keys = 40};
  Inputs inputs(s);
  const std::vector<adaattn_head_plan> dense(2);
  std::vector<adaattn_head_plan> low_rank(2);
  low_rank[1].form = ADAATTN_LOW_RANK;
  std::vector<std::uint8_t> classes(64, ADAATTN_TILE_HIGH);
  const Values out(inputs.dout.size()), lse(40);
  const auto message = [&](const std::vector<adaattn_head_plan>& plans) {
    try {
      run(s, inputs, out, lse, classes, plans, 1);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(dense), "");
  EXPECT_NE(message(low_rank).find("plans[1].form is 2"), std::string::npos);
  classes[1] = 9;
  EXPECT_EQ(message(dense), "") << "dense heads have no classes";
  std::vector<adaattn_head_plan> tiled(2);
  tiled[0].form = tiled[1].form = ADAATTN_TILED;
  EXPECT_NE(message(tiled).find("tile_classes[1] is 9"), std::string::npos);
  tiled[1].low_precision = 5;
  EXPECT_NE(message(tiled).find("plans[1].low_precision is 5"), std::string::npos);
}

}  // namespace
}  // namespace adaattn::testing
