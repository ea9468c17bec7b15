// Merging attention over pieces of the keys gives attention over all of them.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "expected.h"
#include "problem.h"

namespace adaattn::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class MergeTest : public ::testing::TestWithParam<adaattn_dtype> {};

std::string dtype_suffix(const ::testing::TestParamInfo<adaattn_dtype>& info) { return cases::suffix(info.param); }
INSTANTIATE_TEST_SUITE_P(Dtypes, MergeTest, ::testing::ValuesIn(cases::kDtypes), dtype_suffix);

TEST_P(MergeTest, PiecesGiveTheWhole) {
  const cases::Case c = {.name = std::string("merge_") + cases::suffix(GetParam()),
                         .batch = 2,
                         .queries = 9,
                         .keys = 30,
                         .dim = 16,
                         .dtype = GetParam()};
  Problem problem(c);
  const Expected& want = expect(c, problem, problem.forward_args(), /*gradients=*/false);

  const std::vector<std::int64_t> edges = {0, 11, 11, 12, 30};  // one piece is empty: zeros and -inf
  std::vector<Buffer> outs, lses;
  std::vector<Tensor> parts;
  std::vector<const float*> part_lses;
  for (std::size_t piece = 0; piece + 1 < edges.size(); ++piece) {
    outs.emplace_back(Buffer({c.batch, c.query_heads, c.queries, c.dim}, c.dtype, cases::Layout::kContiguous));
    lses.emplace_back(Buffer({c.batch, c.query_heads, c.queries, 1}, ADAATTN_FLOAT32, cases::Layout::kContiguous));
    ForwardArgs args = problem.forward_args();
    for (Tensor* t : {&args.k, &args.v}) {
      t->data = static_cast<std::byte*>(t->data) + edges[piece] * t->stride[2] * dtype_size(t->dtype);
      t->shape[2] = edges[piece + 1] - edges[piece];
    }
    args.out = outs.back().tensor();
    args.lse = Problem::floats(lses.back());
    adaattn::forward(args);
    parts.push_back(args.out);
    part_lses.push_back(args.lse);
  }
  const MergeArgs args = {.parts = parts.data(),
                          .part_lses = part_lses.data(),
                          .count = static_cast<std::int64_t>(parts.size()),
                          .out = problem.out.tensor(),
                          .lse = Problem::floats(problem.lse),
                          .num_threads = 2,
                          .stream = nullptr};
  adaattn::merge(args);
  EXPECT_EQ(problem.out.complaint(), "");
  EXPECT_EQ(problem.lse.complaint(), "");

  // Every piece was rounded to the dtype, too: its bound comes again, once for the pieces' weighted mean.
  Quantity out = want.out, lse = want.lse;
  const double unit = c.dtype == ADAATTN_FLOAT32 ? 0x1p-24 : c.dtype == ADAATTN_FLOAT16 ? 0x1p-11 : 0x1p-8;
  for (std::size_t x = 0; x < out.bound.size(); ++x) {
    const double largest_value = 5;  // |v| of N(0, 1) data; no weighted mean of it is larger
    out.bound[x] = 2 * out.bound[x] + unit * largest_value;
  }
  for (double& bound : lse.bound) bound *= 2;
  EXPECT_EQ(complaint("out", out, problem.out.values(), c.queries * c.dim), "");
  EXPECT_EQ(complaint("lse", lse, problem.lse.values(), c.queries), "");

  // In place: the first part and its lse receive the result.
  MergeArgs in_place = args;
  in_place.out = parts[0];
  in_place.lse = Problem::floats(lses[0]);
  adaattn::merge(in_place);
  EXPECT_EQ(outs[0].values(), problem.out.values());
  EXPECT_EQ(lses[0].values(), problem.lse.values());
}

struct Small {
  std::vector<float> a = {1, 2}, b = {5, 6}, out = {9, 9}, lse_a = {0}, lse_b = {0}, lse = {9};
  void merge() {
    const std::vector<Tensor> parts = {view(a.data(), {1, 1, 1, 2}), view(b.data(), {1, 1, 1, 2})};
    const std::vector<const float*> lses = {lse_a.data(), lse_b.data()};
    adaattn::merge({.parts = parts.data(),
                    .part_lses = lses.data(),
                    .count = 2,
                    .out = view(out.data(), {1, 1, 1, 2}),
                    .lse = lse.data(),
                    .num_threads = 0,
                    .stream = nullptr});
  }
};

TEST(Merge, EqualWeightsAverage) {
  Small s;
  s.merge();
  EXPECT_FLOAT_EQ(s.out[0], 3);
  EXPECT_FLOAT_EQ(s.out[1], 4);
  EXPECT_FLOAT_EQ(s.lse[0], std::log(2.0f));
}

TEST(Merge, PartsWithoutKeysDoNotCountEvenIfTheyHoldNaN) {
  Small s;
  s.lse_a = {-kInfinity};
  s.a = {std::nanf(""), std::nanf("")};
  s.lse_b = {3};
  s.merge();
  EXPECT_FLOAT_EQ(s.out[0], 5);
  EXPECT_FLOAT_EQ(s.lse[0], 3);
}

TEST(Merge, RowsWithoutElementsStillNeedTheirLSEs) {
  float out = 0, lse = 9;
  const Tensor part = view(&out, {1, 1, 1, 0});
  const float* lses[] = {nullptr};
  MergeArgs args = {.parts = &part,
                    .part_lses = lses,
                    .count = 1,
                    .out = view(&out, {1, 1, 1, 0}),
                    .lse = &lse,
                    .num_threads = 0,
                    .stream = nullptr};
  EXPECT_THROW(adaattn::merge(args), Error);
  const float two = 2;
  lses[0] = &two;
  adaattn::merge(args);
  EXPECT_EQ(lse, 2);
}

TEST(Merge, NoKeysAnywhereGivesZeros) {
  Small s;
  s.lse_a = s.lse_b = {-kInfinity};
  s.merge();
  EXPECT_EQ(s.out[0], 0);
  EXPECT_EQ(s.lse[0], -kInfinity);
}

TEST(Merge, HugeDifferencesDoNotOverflow) {
  Small s;
  s.lse_a = {1e4f};
  s.lse_b = {-1e4f};
  s.merge();
  EXPECT_EQ(s.out[0], 1);
  EXPECT_EQ(s.lse[0], 1e4f);
}

TEST(Merge, NaNPropagates) {
  Small s;
  s.lse_a = {std::nanf("")};
  s.merge();
  EXPECT_TRUE(std::isnan(s.out[0]));
  EXPECT_TRUE(std::isnan(s.lse[0]));
}

}  // namespace
}  // namespace adaattn::testing
