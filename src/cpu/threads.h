// How many OpenMP threads a call uses.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace adaattn::cpu {

inline int thread_count(std::int32_t asked) {
  return asked > 0 ? std::min(asked, omp_get_thread_limit()) : omp_get_max_threads();
}

}  // namespace adaattn::cpu
