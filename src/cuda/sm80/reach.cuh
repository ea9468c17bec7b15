// Questions to a Reach: which keys a query sees, and which queries see a key.
#pragma once

#include <cstdint>

#include "common/visibility.h"
#include "cuda/sm80/reach.h"

namespace adaattn::cuda::sm80 {

// Keys in [0, sink_end) and [begin, end) are seen; sink_end <= begin <= end.
struct Keys {
  int sink_end, begin, end;
};

// Of one query; or of the queries first to last all that one of them sees, and what lies between.
__device__ __forceinline__ Keys keys_of(const Reach& reach, int first, int last) {
  const int end = max(0, min(last + reach.end, reach.key_count)), begin = max(0, min(first + reach.begin, end));
  return {min(reach.sinks, begin), begin, end};
}

// The queries [begin, end) that see a key.
struct Queries {
  int begin, end;
};

__device__ __forceinline__ Queries queries_of(const Reach& reach, int key) {
  if (key >= reach.key_count) return {reach.query_count, reach.query_count};
  const int begin = max(0, min(key - reach.end + 1, reach.query_count));
  const int end = max(begin, min(key - reach.begin + 1, reach.query_count));
  return {begin, key < reach.sinks ? reach.query_count : end};
}

// bottom_right: the diagonal moves with the batch entry's number of keys. key_lengths may be null.
__device__ __forceinline__ Reach reach_of(Visibility visibility, bool bottom_right, const std::int64_t* key_lengths,
                                          int batch, int query_count, int key_count) {
  constexpr std::int64_t kFar = 1 << 30;
  if (key_lengths != nullptr) key_count = static_cast<int>(clamp_index(key_lengths[batch], 0, key_count));
  if (bottom_right) visibility.diagonal = key_count - query_count;
  return {.key_count = key_count,
          .query_count = query_count,
          .begin = static_cast<int>(clamp_index(visibility.diagonal - visibility.left, -kFar, kFar)),
          .end = static_cast<int>(clamp_index(visibility.diagonal + visibility.right + 1, -kFar, kFar)),
          .sinks = static_cast<int>(clamp_index(visibility.sinks, 0, kFar))};
}

}  // namespace adaattn::cuda::sm80
