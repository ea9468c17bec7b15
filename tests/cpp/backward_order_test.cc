// The deterministic order of the sm_90a backward kernel, walked through on the CPU: if blocks of threads run one after
// the other in the order in which they start, each finds its turn at every tile of dQ. So none ever waits for one that
// starts later, and the kernel ends however few of them run at a time.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "common/error.h"

using std::max;  // device code has them without a namespace
using std::min;

#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/backward/schedule.cuh"

namespace adaattn::cuda::sm90 {
namespace {

struct Problem {
  BackwardParams params{};
  std::vector<std::int64_t> lengths;
  std::string text;
};

template <typename Config>
Problem random_problem(std::mt19937& random) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const auto perhaps = [&](int most) { return pick(0, 1) != 0 ? -1 : pick(0, most); };
  Problem problem;
  BackwardParams& p = problem.params;
  const int key_heads = pick(1, 3), most_tokens = pick(0, 7) == 0 ? 4000 : 900;
  p.batch = pick(1, 3);
  p.group = pick(1, 3);
  p.heads = key_heads * p.group;
  p.query_count = pick(1, most_tokens);
  p.key_count = pick(1, most_tokens);
  adaattn_options o{};
  o.causal = pick(0, 1);
  o.window_left = perhaps(400);
  o.window_right = perhaps(300);
  o.sinks = o.window_left < 0 ? 0 : max(0, perhaps(300));
  o.alignment = pick(0, 1) != 0 ? ADAATTN_BOTTOM_RIGHT : ADAATTN_TOP_LEFT;
  p.visibility = make_visibility(o, p.query_count, p.key_count);
  p.bottom_right = o.alignment == ADAATTN_BOTTOM_RIGHT;
  for (int b = 0; b < p.batch; ++b) problem.lengths.push_back(pick(0, p.key_count));
  if (pick(0, 1) != 0) p.key_lengths = problem.lengths.data();
  p.key_tiles = (p.key_count + Config::kKeys - 1) / Config::kKeys;
  p.query_tiles = (p.query_count + Config::kQueries - 1) / Config::kQueries;
  p.heads_at_once = pick(1, p.batch * key_heads);
  problem.text =
      concat("B ", p.batch, ", heads ", p.heads, "/", key_heads, ", N ", p.query_count, "/", p.key_count, ", causal ",
             o.causal, ", alignment ", o.alignment, ", window ", o.window_left, ", ", o.window_right, ", sinks ",
             o.sinks, ", lengths ", p.key_lengths != nullptr, ", side by side ", p.heads_at_once);
  return problem;
}

template <typename Config>
void walk_in_order(const BackwardParams& params) {
  const int key_heads = params.heads / params.group, blocks = params.batch * key_heads * params.key_tiles;
  std::vector<int> added(static_cast<std::size_t>(params.batch * params.heads * params.query_tiles));
  std::vector<int> started(static_cast<std::size_t>(blocks));
  for (int block = 0; block < blocks; ++block) {
    const KeyPlan plan = plan_keys<Config>(params, block);
    const int place = (plan.batch * key_heads + plan.key_head) * params.key_tiles + plan.first_key / Config::kKeys;
    ASSERT_EQ(++started.at(static_cast<std::size_t>(place)), 1);
    QueryWalk walk(params, plan);
    for (int step = 0; step < plan.tiles * params.group; ++step, walk.advance(plan)) {
      ASSERT_EQ(walk.head / params.group, plan.key_head);
      int& count = added.at(static_cast<std::size_t>(tile_index(params, plan, walk)));
      ASSERT_EQ(turn_of<Config>(params, plan, walk.tile), count)
          << "keys from " << plan.first_key << ", tile " << walk.tile;
      ++count;
    }
  }
}

template <typename Config>
class BackwardOrder : public testing::Test {};
using Configs = testing::Types<BackwardDim64<true>, BackwardDim128<true>>;
TYPED_TEST_SUITE(BackwardOrder, Configs);

TYPED_TEST(BackwardOrder, WaitsOnlyForBlocksThatStartedBefore) {
  std::mt19937 random(7);
  for (int i = 0; i < 2000 && !this->HasFatalFailure(); ++i) {
    const Problem problem = random_problem<TypeParam>(random);
    SCOPED_TRACE(problem.text);
    walk_in_order<TypeParam>(problem.params);
  }
}

}  // namespace
}  // namespace adaattn::cuda::sm90
