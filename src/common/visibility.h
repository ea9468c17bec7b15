// Which keys a query may see: causal diagonal, sliding window, sinks and key length as plain arithmetic,
// the same functions for every kernel, on the host and on the device.
#pragma once

#include <cstdint>
#include <limits>

#include "adaattn/adaattn.h"

namespace adaattn {

struct Visibility {        // of one batch entry
  std::int64_t key_count;  // keys that exist: the key length, or Nk
  std::int64_t diagonal;   // the key that query 0 stands at; negative if there are fewer keys than queries
  std::int64_t left;       // reach before the diagonal
  std::int64_t right;      // reach after it
  std::int64_t sinks;      // first keys that stay visible left of the window
  // Query i below stands where query first_query + i * query_step of the whole sequence stands.
  std::int64_t first_query = 0, query_step = 1;
};

// The keys [0, sink_end) and [begin, end), with 0 <= sink_end <= begin <= end <= key_count.
struct KeyRange {
  std::int64_t sink_end, begin, end;
};

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max() / 4;

constexpr std::int64_t clamp_index(std::int64_t value, std::int64_t low, std::int64_t high) {
  return value < low ? low : value > high ? high : value;
}

constexpr Visibility make_visibility(const adaattn_options& options, std::int64_t query_count, std::int64_t key_count) {
  const std::int64_t right = options.window_right < 0 ? kUnlimited : options.window_right;
  return {.key_count = key_count,
          .diagonal = options.alignment == ADAATTN_BOTTOM_RIGHT ? key_count - query_count : 0,
          .left = options.window_left < 0 ? kUnlimited : clamp_index(options.window_left, 0, kUnlimited),
          .right = options.causal != 0 ? 0 : clamp_index(right, 0, kUnlimited),
          .sinks = options.sinks};
}

// Every key that at least one of the queries first..last sees lies in this range (exactly those, for one query).
constexpr KeyRange visible_keys(const Visibility& v, std::int64_t first, std::int64_t last) {
  const std::int64_t first_place = v.first_query + first * v.query_step + v.diagonal;
  const std::int64_t last_place = v.first_query + last * v.query_step + v.diagonal;
  const std::int64_t end = clamp_index(last_place + v.right + 1, 0, v.key_count);
  const std::int64_t begin = clamp_index(first_place - v.left, 0, end);
  return {.sink_end = clamp_index(v.sinks, 0, begin), .begin = begin, .end = end};
}

constexpr bool sees(const Visibility& v, std::int64_t query, std::int64_t key) {
  const KeyRange range = visible_keys(v, query, query);
  return key < range.sink_end || (key >= range.begin && key < range.end);
}

}  // namespace adaattn
