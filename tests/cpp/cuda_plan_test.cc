// How the CUDA forward kernel cuts calls up, walked through on the CPU as the kernel does: every visible (row, key)
// pair is met exactly once, whatever is packed and split.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "common/error.h"
#include "cuda/sm90/forward/grid.h"

namespace adaattn::cuda::sm90 {
namespace {

template <int kQueries_, int kKeys_, bool kPacks_, bool kParts_>
struct Tile {
  static constexpr int kQueries = kQueries_, kKeys = kKeys_, kConsumers = kQueries / 64, kBlocks = 1;
  static constexpr bool kPacks = kPacks_, kParts = kParts_;
};

struct Problem {
  adaattn_forward_args args{};
  std::vector<std::int64_t> lengths;
  std::string text;
};

Problem random_problem(std::mt19937& random) {
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const auto one_of = [&](std::vector<std::int64_t> values) {
    return values[static_cast<std::size_t>(pick(0, static_cast<std::int64_t>(values.size()) - 1))];
  };
  Problem problem;
  adaattn_forward_args& args = problem.args;
  const std::int64_t batch = pick(1, 3), key_heads = pick(1, 2), group = one_of({1, 2, 3, 5, 7, 8, 71});
  const std::int64_t nq = one_of({1, 2, 9, 63, 64, 65, 130, 200}), nk = one_of({0, 1, 15, 64, 100, 257, 400});
  args.q.shape[0] = args.k.shape[0] = batch;
  args.q.shape[1] = key_heads * group, args.k.shape[1] = key_heads;
  args.q.shape[2] = nq, args.k.shape[2] = nk;
  args.q.shape[3] = args.k.shape[3] = args.v.shape[3] = 64;
  adaattn_options& o = args.options;
  o.causal = static_cast<std::int32_t>(pick(0, 1));
  o.alignment = static_cast<std::int32_t>(pick(0, 1));
  o.window_left = one_of({-1, -1, 0, 7, 40, 130});
  o.window_right = one_of({-1, -1, 0, 33});
  o.sinks = one_of({0, 0, 4, 70});
  if (pick(0, 1) != 0)
    for (std::int64_t b = 0; b < batch; ++b) problem.lengths.push_back(pick(0, nk));
  args.key_lengths = problem.lengths.empty() ? nullptr : problem.lengths.data();
  problem.text = concat("B ", batch, ", heads ", args.q.shape[1], "/", key_heads, ", N ", nq, "/", nk, ", causal ",
                        o.causal, ", alignment ", o.alignment, ", window ", o.window_left, ", ", o.window_right,
                        ", sinks ", o.sinks, ", lengths ", problem.lengths.size());
  return problem;
}

// How often the kernel meets each (row, key), rows in the order of lse.
template <typename Config>
class Walk {
 public:
  Walk(const TileGrid& grid, const Problem& problem) : grid_(grid), keys_(problem.args.k.shape[2]) {
    const auto rows = static_cast<std::size_t>(grid.batch * grid.heads * grid.query_count);
    met_.resize(rows * static_cast<std::size_t>(keys_));
    tiles_of_row_.resize(rows);
    for (int item = 0; item < item_count(grid); ++item) walk(plan_item<Config>(grid, item));
  }

  int met(std::int64_t row, std::int64_t key) const { return met_[static_cast<std::size_t>(row * keys_ + key)]; }
  int tiles_of_row(std::int64_t row) const { return tiles_of_row_[static_cast<std::size_t>(row)]; }

 private:
  std::int64_t row_of(const TilePlan& plan, const RowPlace& place) const {
    return (static_cast<std::int64_t>(plan.batch) * grid_.heads + place.head) * grid_.query_count + place.query;
  }

  void walk(const TilePlan& plan) {
    ASSERT_EQ(plan.key_head, plan.head / grid_.group);
    for (int step = 0; step < plan.steps; ++step) {
      const int block = block_of_step(plan, step);
      ASSERT_TRUE(block >= 0 && static_cast<std::int64_t>(block) * Config::kKeys < plan.key_count);
      // clear_tail of the kernel looks at the first step only.
      if (step > 0) {
        ASSERT_LE((block + 1) * Config::kKeys, plan.key_count);
      }
    }
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      const StripPlan strip = plan_strip<Config>(grid_, plan, consumer);
      ASSERT_TRUE(strip.first_step >= 0 && strip.first_step <= plan.steps);
      for (int row = 64 * consumer; row < 64 * consumer + 64; ++row) {
        const RowPlace place = place_of_row<Config>(grid_, plan, row);
        if (!place.exists) continue;
        ++tiles_of_row_[static_cast<std::size_t>(row_of(plan, place))];
        int seen = 0;
        for (int step = strip.first_step; step < plan.steps; ++step) {
          const int block = block_of_step(plan, step);
          // Where the kernel keeps a row's maximum so far, there is one.
          if (step > strip.first_step && step < plan.window_steps && block >= strip.full_begin &&
              block < strip.steady_end) {
            ASSERT_GT(seen, 0);
          }
          meet(plan, strip, place, block, seen);
        }
      }
    }
  }

  void meet(const TilePlan& plan, const StripPlan& strip, const RowPlace& place, int block, int& seen) {
    const int first_key = block * Config::kKeys;
    const bool whole = block >= strip.full_begin && block < strip.full_end;
    const HiddenKeys hidden = hidden_keys(visibility_of(grid_, plan.key_count), place.query, first_key);
    if (!limited_left(grid_)) {
      ASSERT_EQ(seen_end(grid_, plan.key_count, place.query) - first_key, hidden.end);
    }
    for (int key = 0; key < Config::kKeys; ++key) {
      if (!whole && (key >= hidden.end || (key < hidden.begin && key >= hidden.sink_end))) continue;
      ASSERT_LT(first_key + key, keys_);
      ++seen;
      ++met_[static_cast<std::size_t>(row_of(plan, place) * keys_ + first_key + key)];
    }
  }

  const TileGrid& grid_;
  std::int64_t keys_;
  std::vector<int> met_, tiles_of_row_;
};

template <typename Config>
void check(const Problem& problem, int multiprocessors) {
  const TileGrid grid = make_grid<Config>(problem.args, multiprocessors);
  const Walk<Config> walk(grid, problem);
  std::int64_t row = 0;
  for (int b = 0; b < grid.batch; ++b) {
    const std::int64_t length = problem.lengths.empty() ? grid.key_count : problem.lengths[static_cast<std::size_t>(b)];
    Visibility visibility = make_visibility(problem.args.options, grid.query_count, length);
    for (int h = 0; h < grid.heads; ++h)
      for (int i = 0; i < grid.query_count; ++i, ++row) {
        ASSERT_TRUE(walk.tiles_of_row(row) == 1 || walk.tiles_of_row(row) == grid.parts) << problem.text;
        for (std::int64_t key = 0; key < grid.key_count; ++key)
          ASSERT_EQ(walk.met(row, key), sees(visibility, i, key) ? 1 : 0)
              << problem.text << ": batch " << b << ", head " << h << ", query " << i << ", key " << key << ", tile "
              << Config::kQueries << " x " << Config::kKeys << ", parts " << grid.parts;
      }
  }
}

TEST(CudaPlan, MeetsEveryVisiblePairOnceWhateverIsPackedAndSplit) {
  std::mt19937 random(1);
  for (int i = 0; i < 120; ++i) {
    const Problem problem = random_problem(random);
    const int multiprocessors = i % 3 == 0 ? 132 : i % 3 == 1 ? 7 : 40;
    check<Tile<192, 128, false, false>>(problem, multiprocessors);
    check<Tile<192, 16, false, false>>(problem, multiprocessors);
    check<Tile<256, 64, false, false>>(problem, multiprocessors);
    check<Tile<128, 176, false, true>>(problem, multiprocessors);
    check<Tile<64, 16, true, true>>(problem, multiprocessors);
    check<Tile<128, 32, true, true>>(problem, multiprocessors);
    if (HasFatalFailure()) return;
  }
}

// Listed blocks, as the kernel takes them: the producer copies what the list says, while consumers count steps down
// from the last block. That has to lead to the same rows being hidden wherever some are.
template <typename Config>
void check_listed(const Problem& problem, std::mt19937& random) {
  TileGrid grid = make_grid<Config>(problem.args, 132);
  grid.packs_at_once = 3;
  const int all = grid.batch * grid.heads;
  std::vector<int> heads;
  for (int head = 0; head < all; ++head)
    if (random() % 3 != 0) heads.push_back(head);
  std::vector<int> tiles(static_cast<std::size_t>(all * grid.tiles_per_pack));
  const int count = static_cast<int>(heads.size());
  for (int item = 0; item < count * grid.tiles_per_pack; ++item) {
    TilePlan plan = place_of_listed<Config>(grid, count, heads.data(), item);
    const int head = plan.batch * grid.heads + plan.head, tile = plan.first_query / Config::kQueries;
    ++tiles[static_cast<std::size_t>(head * grid.tiles_per_pack + tile)];
    ASSERT_EQ(plan.key_head, plan.head / grid.group);
    const int end = seen_end(grid, grid.key_count, plan.first_query), edge = most(end - 1, 0) / Config::kKeys;
    std::vector<int> order;
    for (int block = plan.block_end - 1; block >= 0; --block)
      if (block >= edge || random() % 2 == 0) order.push_back(block);
    keep_steps(plan, static_cast<int>(order.size()));
    ASSERT_EQ(plan.steps, static_cast<int>(order.size())) << problem.text;
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      const StripPlan strip = plan_strip<Config>(grid, plan, consumer);
      for (int step = 0; step < plan.steps; ++step) {
        const int block = order[static_cast<std::size_t>(step)], thought = block_of_step(plan, step);
        const bool whole = thought >= strip.full_begin && thought < strip.full_end;
        for (int row = 64 * consumer; row < 64 * consumer + 64; ++row) {
          const RowPlace place = place_of_row<Config>(grid, plan, row);
          if (!place.exists) continue;
          const int hidden_from = seen_end(grid, grid.key_count, place.query) - block * Config::kKeys;
          if (step < strip.first_step) {
            ASSERT_LE(hidden_from, 0) << problem.text;
          } else if (whole) {
            ASSERT_GE(hidden_from, Config::kKeys) << problem.text;
          } else {
            ASSERT_EQ(thought, block) << problem.text;
          }
        }
      }
    }
  }
  for (int head = 0; head < all; ++head)
    for (int tile = 0; tile < grid.tiles_per_pack; ++tile)
      ASSERT_EQ(tiles[static_cast<std::size_t>(head * grid.tiles_per_pack + tile)],
                std::count(heads.begin(), heads.end(), head));
}

TEST(CudaPlan, ListedBlocksAreHiddenWhereTheyLie) {
  std::mt19937 random(2);
  for (int i = 0; i < 200; ++i) {
    Problem problem = random_problem(random);
    problem.args.options.window_left = problem.args.options.window_right = -1;
    problem.args.key_lengths = nullptr;
    check_listed<Tile<192, 32, false, false>>(problem, random);
    check_listed<Tile<128, 16, false, false>>(problem, random);
    if (HasFatalFailure()) return;
  }
}

TEST(CudaPlan, PartsOfATileShareItsStepsEvenly) {
  for (int window = 0; window <= 9; ++window)
    for (int sinks = 0; sinks <= 3; ++sinks)
      for (int parts = 1; parts <= 13; ++parts) {
        TilePlan whole{};
        whole.steps = window + sinks, whole.window_steps = window, whole.block_end = 20, whole.sink_blocks = sinks;
        int step = 0;
        for (int part = 0; part < parts; ++part) {
          TilePlan plan = whole;
          take_part(plan, part, parts);
          ASSERT_LE(plan.steps, (whole.steps + parts - 1) / parts);
          for (int i = 0; i < plan.steps; ++i) ASSERT_EQ(block_of_step(plan, i), block_of_step(whole, step++));
        }
        ASSERT_EQ(step, whole.steps);
      }
}

TEST(CudaPlan, HeadsShareATileWhereThatMakesFewerTiles) {
  using Config = Tile<64, 64, true, true>;
  const auto packs = [](int heads, int group, int queries) {
    TileGrid grid{};
    grid.batch = 2, grid.heads = heads, grid.group = group, grid.query_count = queries;
    choose_packs<Config>(grid);
    return std::pair(grid.pack_heads, tile_count(grid));
  };
  EXPECT_EQ(packs(32, 4, 1), std::pair(4, 2 * 8));           // decoding with grouped heads
  EXPECT_EQ(packs(32, 1, 1), std::pair(1, 2 * 32));          // nothing to share
  EXPECT_EQ(packs(32, 4, 16), std::pair(4, 2 * 8));          // 64 rows
  EXPECT_EQ(packs(32, 4, 4096), std::pair(1, 2 * 32 * 64));  // tiles are full anyway
  EXPECT_EQ(packs(128, 128, 1), std::pair(64, 2 * 2));       // more heads than rows
  EXPECT_EQ(packs(71, 71, 1), std::pair(64, 2 * 2));         // the second pack has 7 heads
  EXPECT_EQ(packs(10, 5, 64), std::pair(1, 2 * 10));         // packed, 60 of 64 rows would be used
}

TEST(CudaPlan, PartsFillTheMultiprocessors) {
  // B 8, 8 key heads, 32,768 keys in steps of 64, two blocks on each of 132 multiprocessors.
  EXPECT_EQ(choose_parts(64, 512, 264), 4);
  // One sequence: 8 tiles on 264 slots.
  EXPECT_EQ(choose_parts(8, 512, 264), 32);
  // Enough tiles, and too few steps to share.
  EXPECT_EQ(choose_parts(264, 512, 264), 1);
  EXPECT_EQ(choose_parts(64, 2, 264), 1);
  EXPECT_EQ(choose_parts(0, 512, 264), 1);
  EXPECT_EQ(choose_parts(64, 0, 264), 1);
  for (const int tiles : {1, 3, 50, 131, 132, 133, 263, 264})
    for (const int steps : {1, 7, 64, 512, 4096}) {
      const int parts = choose_parts(tiles, steps, 264);
      ASSERT_TRUE(parts >= 1 && parts <= std::min(std::max(steps, 1), kMostParts));
      ASSERT_LE(busiest_steps(tiles, steps, parts, 264), busiest_steps(tiles, steps, 1, 264));
    }
}

TEST(CudaPlan, OnlyTheLastWaveIsSplitWhereThereAreManyTiles) {
  using Config = Tile<128, 176, false, true>;
  TileGrid grid{};
  grid.batch = 4, grid.heads = 16, grid.group = 1, grid.query_count = grid.key_count = 8192;
  grid.visibility = make_visibility(adaattn_default_options(), 8192, 8192);
  choose_packs<Config>(grid);
  choose_split<Config>(grid, 132, false);
  EXPECT_EQ(tile_count(grid), 4096);
  EXPECT_EQ(grid.whole_tiles, 31 * 132);
  EXPECT_GT(grid.parts, 8);
  choose_split<Config>(grid, 132, true);  // the last tiles are the shortest then
  EXPECT_EQ(grid.parts, 1);
}

}  // namespace
}  // namespace adaattn::cuda::sm90
