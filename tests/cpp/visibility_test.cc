// The arithmetic of visible keys against the words of adaattn.h, over all small problems.
#include "common/visibility.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace adaattn {
namespace {

bool by_definition(const adaattn_options& o, std::int64_t query, std::int64_t key, std::int64_t nq, std::int64_t nk) {
  const std::int64_t diagonal = o.alignment == ADAATTN_TOP_LEFT ? query : query + nk - nq;
  if (o.causal != 0 && key > diagonal) return false;
  if (o.window_right != -1 && key > diagonal + o.window_right) return false;
  return o.window_left == -1 || key >= diagonal - o.window_left || key < o.sinks;
}

template <typename Visit>
void for_all_options(Visit&& visit) {
  for (const int causal : {0, 1})
    for (const int alignment : {ADAATTN_TOP_LEFT, ADAATTN_BOTTOM_RIGHT})
      for (const std::int64_t left : {-1, 0, 1, 3})
        for (const std::int64_t right : {-1, 0, 2})
          for (const std::int64_t sinks : {0, 1, 4}) {
            adaattn_options o{};
            o.causal = causal, o.alignment = alignment;
            o.window_left = left, o.window_right = right, o.sinks = sinks;
            visit(o);
          }
}

TEST(Visibility, AgreesWithTheDefinitionForEveryQueryAndKey) {
  for_all_options([](const adaattn_options& o) {
    for (std::int64_t nq = 0; nq <= 7; ++nq)
      for (std::int64_t nk = 0; nk <= 7; ++nk) {
        const Visibility v = make_visibility(o, nq, nk);
        for (std::int64_t i = 0; i < nq; ++i)
          for (std::int64_t j = 0; j < nk; ++j)
            ASSERT_EQ(sees(v, i, j), by_definition(o, i, j, nq, nk))
                << "query " << i << " of " << nq << ", key " << j << " of " << nk << ", causal " << o.causal
                << ", alignment " << o.alignment << ", window " << o.window_left << ", " << o.window_right << ", sinks "
                << o.sinks;
      }
  });
}

TEST(Visibility, RangeOfAQueryBlockCoversEveryKeyThatOneOfThemSees) {
  for_all_options([](const adaattn_options& o) {
    for (const std::int64_t nk : {1, 4, 9}) {
      const std::int64_t nq = 8;
      const Visibility v = make_visibility(o, nq, nk);
      for (std::int64_t first = 0; first < nq; ++first)
        for (std::int64_t last = first; last < nq; ++last) {
          const KeyRange range = visible_keys(v, first, last);
          ASSERT_TRUE(0 <= range.sink_end && range.sink_end <= range.begin && range.begin <= range.end &&
                      range.end <= nk);
          for (std::int64_t i = first; i <= last; ++i)
            for (std::int64_t j = 0; j < nk; ++j)
              if (by_definition(o, i, j, nq, nk)) {
                ASSERT_TRUE(j < range.sink_end || (j >= range.begin && j < range.end))
                    << "query " << i << ", key " << j;
              }
        }
    }
  });
}

TEST(Visibility, HugeWindowsDoNotOverflow) {
  adaattn_options o{};
  o.window_left = o.window_right = o.sinks = INT64_MAX;
  const Visibility v = make_visibility(o, 4, 4);
  for (std::int64_t i = 0; i < 4; ++i)
    for (std::int64_t j = 0; j < 4; ++j) EXPECT_TRUE(sees(v, i, j));
}

}  // namespace
}  // namespace adaattn
