// How many OpenMP threads a call uses.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace adaattn::cpu {

inline int thread_count(std::int32_t asked) {
  return asked > 0 ? std::min(asked, omp_get_thread_limit()) : omp_get_max_threads();
}

// The threads that pay for themselves: waking one costs about as much as 2^17 multiply-adds.
inline int threads_for(std::int64_t multiply_adds, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(multiply_adds >> 17, 1, threads));
}

}  // namespace adaattn::cpu
