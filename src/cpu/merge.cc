#include "cpu/merge.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/tensor.h"
#include "cpu/threads.h"

namespace adaattn::cpu {

void merge(const adaattn_merge_args& args) {
  const std::int64_t heads = args.out.shape[1], tokens = args.out.shape[2], dim = args.out.shape[3];
  const std::int64_t rows = args.out.shape[0] * heads * tokens;
  constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
#pragma omp parallel for num_threads(thread_count(args.num_threads))
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t b = row / (heads * tokens), h = row / tokens % heads, n = row % tokens;
    double top = kMinusInfinity, sum = 0;
    for (std::int64_t p = 0; p < args.count; ++p)
      if (!(args.part_lses[p][row] <= top)) top = args.part_lses[p][row];  // NaN wins
    if (top != kMinusInfinity)
      for (std::int64_t p = 0; p < args.count; ++p) sum += std::exp(args.part_lses[p][row] - top);
    const double lse = top == kMinusInfinity ? top : top + std::log(sum);
    for (std::int64_t d = 0; d < dim; ++d) {  // a part may be out itself, so each element is read whole, then written
      double value = 0;
      for (std::int64_t p = 0; p < args.count; ++p)
        if (args.part_lses[p][row] != kMinusInfinity)
          value += std::exp(args.part_lses[p][row] - lse) * load(args.parts[p], b, h, n, d);
      store_element(args.out.data, offset_of(args.out, b, h, n, d), args.out.dtype, static_cast<float>(value));
    }
    if (args.lse != nullptr) args.lse[row] = static_cast<float>(lse);
  }
}

}  // namespace adaattn::cpu
