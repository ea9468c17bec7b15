// Gradients of a tiled forward pass against difference quotients of an FP64 model of it, its classes held fixed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "adaattn/attention.h"
#include "buffer.h"
#include "common/error.h"
#include "common/visibility.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

struct Shape {
  const char* name = "";
  std::int64_t query_heads = 2, key_heads = 2, queries = 150, keys = 200, dim = 24, value_dim = 40;
  bool causal = true;
  std::int64_t key_length = -1;
};
void PrintTo(const Shape& shape, std::ostream* stream) { *stream << shape.name; }

using Values = std::vector<double>;

// The function that a forward pass with these classes computes, from the definition: sum over dout * out.
class Model {
 public:
  Model(const Shape& shape, std::int64_t panel, const std::vector<std::uint8_t>& classes,
        const std::vector<adaattn_head_plan>& plans, const adaattn_options& options)
      : s_(shape),
        panel_(panel),
        classes_(classes),
        plans_(plans),
        visibility_(make_visibility(options, shape.queries, shape.key_length < 0 ? shape.keys : shape.key_length)) {}

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
    } else if (c == ADAATTN_TILE_SUMMARISED) {
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

struct Inputs {
  explicit Inputs(const Shape& s) {
    Random random(23);
    const auto fill = [&](std::int64_t count) {
      std::vector<float> values(static_cast<std::size_t>(count));
      for (float& x : values) x = random.normal();
      return values;
    };
    q = fill(s.query_heads * s.queries * s.dim);
    k = fill(s.key_heads * s.keys * s.dim);
    v = fill(s.key_heads * s.keys * s.value_dim);
    dout = fill(s.query_heads * s.queries * s.value_dim);
  }
  std::vector<float> q, k, v, dout;
};

adaattn_options options_of(const Shape& s) {
  adaattn_options options = adaattn_default_options();
  options.causal = s.causal ? 1 : 0;
  options.alignment = ADAATTN_BOTTOM_RIGHT;
  return options;
}

// Classes as a forward pass could have them: panels that see only part of a tile have it high.
std::vector<std::uint8_t> random_classes(const Shape& s, std::int64_t panel) {
  Random random(29);
  const Visibility visibility = make_visibility(options_of(s), s.queries, s.key_length < 0 ? s.keys : s.key_length);
  std::vector<std::uint8_t> classes;
  for (std::int64_t h = 0; h < s.query_heads; ++h)
    for (std::int64_t first = 0; first < s.queries; first += panel)
      for (std::int64_t tile = 0; tile < s.keys; tile += 64) {
        const std::int64_t last = std::min(first + panel, s.queries) - 1;
        const std::int64_t end = std::min(tile + 64, visibility.key_count);
        auto c = static_cast<std::uint8_t>(1 + 5 * random.uniform());
        if (c == ADAATTN_TILE_POOLED && end - tile < 64) c = ADAATTN_TILE_DROPPED;
        if (tile == 0 || visible_keys(visibility, first, first).end < end) c = ADAATTN_TILE_HIGH;
        if (visible_keys(visibility, last, last).end <= tile) c = ADAATTN_TILE_HIDDEN;
        classes.push_back(c);
      }
  return classes;
}

struct Gradients {
  std::vector<float> q, k, v;
};

Gradients run(const Shape& s, Inputs& inputs, const Values& out, const Values& lse,
              const std::vector<std::uint8_t>& classes, const std::vector<adaattn_head_plan>& plans, int threads) {
  Gradients got = {.q = std::vector<float>(inputs.q.size(), NAN),
                   .k = std::vector<float>(inputs.k.size(), NAN),
                   .v = std::vector<float>(inputs.v.size(), NAN)};
  std::vector<float> out32(out.begin(), out.end()), lse32(lse.begin(), lse.end());
  const auto view = [](std::vector<float>& x, std::int64_t heads, std::int64_t tokens, std::int64_t dim) {
    return adaattn::view(x.data(), {1, heads, tokens, dim});
  };
  BackwardArgs args{};
  args.q = view(inputs.q, s.query_heads, s.queries, s.dim);
  args.k = view(inputs.k, s.key_heads, s.keys, s.dim);
  args.v = view(inputs.v, s.key_heads, s.keys, s.value_dim);
  args.out = view(out32, s.query_heads, s.queries, s.value_dim);
  args.dout = view(inputs.dout, s.query_heads, s.queries, s.value_dim);
  args.dq = view(got.q, s.query_heads, s.queries, s.dim);
  args.dk = view(got.k, s.key_heads, s.keys, s.dim);
  args.dv = view(got.v, s.key_heads, s.keys, s.value_dim);
  args.lse = lse32.data();
  args.options = options_of(s);
  args.options.num_threads = threads;
  args.key_lengths = s.key_length < 0 ? nullptr : &s.key_length;
  args.plans = plans.data();
  args.tile_classes = classes.data();
  adaattn::backward(args);
  return got;
}

Values wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

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
    const Model model(s, panel, classes, plans, options_of(s));
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
  const Model model(s, panel, classes, plans, args.options);
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
}

}  // namespace
}  // namespace adaattn::testing
