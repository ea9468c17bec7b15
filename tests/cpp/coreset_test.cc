// The weighted key coreset: what it gets right, what it says about itself, and what it refuses.
#include "cpu/coreset.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "problem.h"
#include "targets.h"

namespace adaattn::testing {
namespace {

// Keys, values and queries that change smoothly along a line, as those of neighbouring pixels do: scores fall with the
// distance of two places, so few keys can stand for all of them.
void make_smooth(Problem& problem, std::int64_t keys, float frequency, float noise) {
  Random random(11);
  const auto code = [&](std::int64_t n, std::int64_t d) {
    const double place = static_cast<double>(n) / static_cast<double>(keys);
    const double angle = frequency * static_cast<double>(1 + d / 2) * place;
    return static_cast<float>(1.5 * (d % 2 == 0 ? std::cos(angle) : std::sin(angle))) + noise * random.normal();
  };
  problem.q.fill([&](auto, auto, auto n, auto d) { return code(n, d); });
  problem.k.fill([&](auto, auto, auto n, auto d) { return code(n, d) + 2.0F; });  // a mean, which must not matter
  problem.v.fill([&](auto, auto, auto n, auto d) {
    return static_cast<float>(std::sin(0.01 * static_cast<double>((d + 1) * n)));
  });
}

struct Approximation {
  bool built = false;
  std::int64_t size = 0, failed = 0;
  std::vector<float> out, lse;  // of query head 0 of batch entry 0, as float32
};

Approximation run_coreset(const ForwardArgs& args, std::size_t capacity, std::int64_t b = 0, std::int64_t h = 0) {
  Scratch sizes(nullptr);
  cpu::lay_out_coreset(args, capacity, sizes), cpu::lay_out_coreset_thread(args, capacity, sizes);
  std::vector<std::byte> memory(sizes.bytes() + 64, std::byte{0xFF});
  auto* base = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  Scratch scratch(base);
  const cpu::Coreset coreset = cpu::lay_out_coreset(args, capacity, scratch);
  const cpu::CoresetScratch thread = cpu::lay_out_coreset_thread(args, capacity, scratch);
  Approximation run;
  const std::int64_t key_head = h / (args.q.shape[1] / args.k.shape[1]);
  run.built = cpu::build_coreset(args, b, key_head, capacity, thread, coreset);
  run.size = *coreset.size;
  if (!run.built) return run;
  const std::int64_t rows = args.q.shape[2], dv = args.v.shape[3];
  run.out.assign(static_cast<std::size_t>(rows * dv), std::nanf(""));
  run.lse.assign(static_cast<std::size_t>(rows), std::nanf(""));
  const auto scale = static_cast<float>(
      args.options.has_scale != 0 ? args.options.scale : 1 / std::sqrt(static_cast<double>(args.q.shape[3])));
  const cpu::Rows out = {.data = run.out.data(),
                         .dtype = ADAATTN_FLOAT32,
                         .row_stride = dv,
                         .element_stride = 1,
                         .dim = static_cast<std::size_t>(dv)};
  run.failed = cpu::attend_coreset(cpu::rows_of(args.q, b, h, 0), rows, scale, coreset, thread, out, run.lse.data());
  return run;
}

// Relative Frobenius error of the head's output, and the largest error of its LSE.
std::pair<double, double> errors(const ForwardArgs& args, const Approximation& run, std::int64_t b = 0,
                                 std::int64_t h = 0) {
  const std::size_t heads = static_cast<std::size_t>(args.q.shape[0] * args.q.shape[1]);
  const std::size_t head = static_cast<std::size_t>(b * args.q.shape[1] + h);
  std::vector<double> out(heads * run.out.size()), lse(heads * run.lse.size());
  EXPECT_EQ(adaattn_reference_forward(&args, out.data(), lse.data()), ADAATTN_OK) << adaattn_last_error();
  double difference = 0, norm = 0, largest = 0;
  for (std::size_t i = 0; i < run.out.size(); ++i) {
    const double truth = out[head * run.out.size() + i], off = static_cast<double>(run.out[i]) - truth;
    difference += off * off;
    norm += truth * truth;
  }
  for (std::size_t i = 0; i < run.lse.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(run.lse[i]) - lse[head * run.lse.size() + i]));
  return {std::sqrt(difference / norm), largest};
}

const cases::Case kSmooth = {
    .name = "smooth", .query_heads = 2, .key_heads = 1, .queries = 300, .keys = 700, .dim = 32, .value_dim = 24};

// The Nystrom method is exact where the coreset has the kernel's rank, and on a line 64 keys nearly have it.
TEST(Coreset, SmoothHeadsNeedFewKeys) {
  Problem problem(kSmooth);
  make_smooth(problem, kSmooth.keys, 3, 0.02F);
  const ForwardArgs args = problem.forward_args();
  double before = 1;
  for (const std::size_t capacity : {16, 64, 175}) {
    const Approximation run = run_coreset(args, capacity);
    ASSERT_TRUE(run.built);
    EXPECT_EQ(run.failed, 0);
    const auto [error, lse_error] = errors(args, run);
    EXPECT_LT(error, before) << capacity;
    before = error;
    if (capacity < 64) continue;
    EXPECT_LE(error, 0.05) << capacity;  // a sixteenth and a quarter of what dropping the others would leave
    EXPECT_LE(lse_error, 0.2) << capacity;
  }
}

// With all keys chosen W is the identity: what is left is float32 arithmetic, whose errors the kernel's condition (up
// to 1 over the least residual that is taken, 1e4) may grow.
TEST(Coreset, AllKeysGiveAttention) {
  const cases::Case c = {.name = "all", .queries = 60, .keys = 90, .dim = 24};
  Problem problem(c);
  const ForwardArgs args = problem.forward_args();
  const Approximation run = run_coreset(args, 90);
  ASSERT_TRUE(run.built);
  EXPECT_EQ(run.size, 90);  // random keys in 24 dimensions are far apart
  const auto [error, lse_error] = errors(args, run);
  EXPECT_LE(error, 1e4 * 0x1p-24);
  EXPECT_LE(lse_error, 1e4 * 0x1p-24);
}

// Equal keys are one key, and the coreset says so instead of filling up with copies.
TEST(Coreset, FewDistinctKeys) {
  const cases::Case c = {.name = "few", .queries = 40, .keys = 300, .dim = 16};
  Problem problem(c);
  problem.k.fill([&](auto, auto, auto n, auto d) { return std::sin(static_cast<float>((n % 5) * 7 + d)); });
  const ForwardArgs args = problem.forward_args();
  const Approximation run = run_coreset(args, 64);
  ASSERT_TRUE(run.built);
  EXPECT_EQ(run.size, 5);
  EXPECT_LE(errors(args, run).first, 1e4 * 0x1p-24);
}

TEST(Coreset, NegativeScaleKeyLengthsAndHeads) {
  cases::Case c = kSmooth;
  c.batch = 3;
  c.key_lengths = true;
  c.scale = -0.2;
  Problem problem(c);
  make_smooth(problem, c.keys, 3, 0.02F);
  const ForwardArgs args = problem.forward_args();
  EXPECT_FALSE(run_coreset(args, 64, 0, 0).built);  // no keys
  for (std::int64_t b = 1; b < 3; ++b) {
    const Approximation run = run_coreset(args, 128, b, 1);
    ASSERT_TRUE(run.built);
    EXPECT_LE(errors(args, run, b, 1).first, 0.05) << b;
  }
}

TEST(Coreset, SixteenBitAndEveryInstructionSet) {
  for (const adaattn_dtype dtype : {ADAATTN_FLOAT16, ADAATTN_BFLOAT16}) {
    cases::Case c = kSmooth;
    c.dtype = dtype;
    c.layout = cases::Layout::kTokensFirst;
    Problem problem(c);
    make_smooth(problem, c.keys, 3, 0.02F);
    const ForwardArgs args = problem.forward_args();
    for (const std::int64_t id : hwy::SupportedAndGeneratedTargets()) {
      const OnlyTarget only(id);
      const Approximation run = run_coreset(args, 100);
      ASSERT_TRUE(run.built) << hwy::TargetName(id);
      EXPECT_LE(errors(args, run).first, 0.05) << hwy::TargetName(id);
      const Approximation again = run_coreset(args, 100);
      EXPECT_EQ(run.out, again.out);
      EXPECT_EQ(run.lse, again.lse);
    }
  }
}

TEST(Coreset, NothingSoundComesFromNaN) {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()})
    for (const int where : {0, 1, 2}) {
      Problem problem(kSmooth);
      Buffer& buffer = where == 0 ? problem.q : where == 1 ? problem.k : problem.v;
      buffer.fill(
          [&](auto, auto, auto n, auto d) { return n % 2 == 0 && d == 1 ? bad : 0.5F * static_cast<float>(n % 7); });
      EXPECT_FALSE(run_coreset(problem.forward_args(), 32).built) << where;
    }
}

TEST(Coreset, Work) {
  Problem problem(kSmooth);
  const ForwardArgs args = problem.forward_args();
  const cpu::CoresetWork work = cpu::coreset_work(args, 10);
  EXPECT_DOUBLE_EQ(work.attend, 10 * (32 + 25));
  EXPECT_DOUBLE_EQ(work.build, 700 * 32 * (2 * 37.5 + 10) + 700 * 100 / 2 + (7000 + 50) * 25);
}

}  // namespace
}  // namespace adaattn::testing
