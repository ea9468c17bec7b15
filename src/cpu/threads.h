// How many OpenMP threads a call uses.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

inline int thread_count(std::int32_t asked) {
  return asked > 0 ? std::min(asked, omp_get_thread_limit()) : omp_get_max_threads();
}

// The threads that pay for themselves in a call on these scores and head sizes: waking one costs about as much as 2^17
// multiply-adds.
inline int threads_for(const adaattn_tensor& q, const adaattn_tensor& k, const adaattn_tensor& v, int threads) {
  const double scores =
      static_cast<double>(q.shape[0] * q.shape[1]) * static_cast<double>(q.shape[2]) * static_cast<double>(k.shape[2]);
  const double paid = scores * static_cast<double>(q.shape[3] + v.shape[3]) * 0x1p-17;
  return static_cast<int>(std::clamp(paid, 1.0, static_cast<double>(threads)));
}

}  // namespace adaattn::cpu
