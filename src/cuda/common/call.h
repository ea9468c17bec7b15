// What the host sides of the CUDA kernels ask of a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::cuda {

inline bool has_elements(const adaattn_tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3] > 0; }

// The larger head size, which the tiles are cut for. Args: adaattn_forward_args or adaattn_backward_args.
template <typename Args>
std::int64_t dim_of(const Args& args) {
  return std::max(args.q.shape[3], args.v.shape[3]);
}

template <typename Args>
double scale_of(const Args& args) {
  return args.options.has_scale != 0 ? args.options.scale : 1.0 / std::sqrt(static_cast<double>(args.q.shape[3]));
}

// Whether some tiles meet fewer keys, or queries, than others.
template <typename Args>
bool tiles_differ(const Args& args) {
  const adaattn_options& o = args.options;
  return o.causal != 0 || o.window_left >= 0 || o.window_right >= 0 || args.key_lengths != nullptr;
}

}  // namespace adaattn::cuda
