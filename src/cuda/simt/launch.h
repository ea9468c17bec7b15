// The parameters of the float32 kernels that run on ordinary cores, and their launches.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "common/visibility.h"
#include "cuda/sm80/mask_view.h"

namespace adaattn::cuda::simt {

struct TensorView {
  float* data;
  std::int64_t stride[4];  // in elements
};

inline TensorView make_tensor_view(const adaattn_tensor& tensor) {
  TensorView view{.data = static_cast<float*>(tensor.data), .stride = {}};
  std::copy_n(tensor.stride, 4, view.stride);
  return view;
}

struct ForwardParams {
  TensorView q, k, v, out;                 // [batch, head, token, dim]
  float *lse, *entropy, *max_probability;  // [batch, heads, query_count] or null
  const std::int64_t* key_lengths;         // [batch] or null
  sm80::MaskView mask;
  const unsigned* only_if;  // the kernel returns at once where this is 0; or null
  Visibility visibility;
  bool bottom_right;
  float scale;
  int batch, heads, group, query_count, key_count, dim, dim_v;
};

struct BackwardParams {
  TensorView q, k, v, out, dout, dq, dk, dv;  // [batch, head, token, dim]
  const float* lse;                           // [batch, heads, query_count]
  float* delta;                               // the same, written first
  const std::int64_t* key_lengths;            // [batch] or null
  sm80::MaskView mask;
  Visibility visibility;
  bool bottom_right;
  float scale;
  int batch, heads, group, query_count, key_count, dim, dim_v;
};

// dim and dim_v are at most 256.
void launch_forward(const ForwardParams& params, cudaStream_t stream);
void launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace adaattn::cuda::simt
