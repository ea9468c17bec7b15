// Where the numbers of a row go.
#pragma once

#include <cstdint>

#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

constexpr float kLn2 = 0.693147180559945f;

template <bool kStatistics>
__device__ __forceinline__ void store_row_result(const ForwardParams& params, int batch, const RowPlace& place,
                                                 const RowResult& result) {
  const TileGrid& grid = params.grid;
  const std::int64_t at = (static_cast<std::int64_t>(batch) * grid.heads + place.head) * grid.query_count + place.query;
  if (params.lse != nullptr) params.lse[at] = result.lse_log2 * kLn2;
  if constexpr (kStatistics) {
    if (params.entropy != nullptr) params.entropy[at] = result.entropy;
    if (params.max_probability != nullptr) params.max_probability[at] = result.max_probability;
  }
}

}  // namespace adaattn::cuda::sm90
