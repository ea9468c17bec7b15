// Writes float32 tensors as sums of two bfloat16, for the tensor cores.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace adaattn::cuda::sm90 {

struct SplitTensor {
  const float* from;            // [batch, head, token, dim], dim contiguous, rows on 16 bytes
  std::int64_t stride[3];       // of batch, head and token, in elements
  void* to;                     // [batch, head, token, 2 * padded_dim] bfloat16, contiguous
  int heads, tokens, dim;       // dim is a multiple of 8
  std::int64_t rows;            // batch * heads * tokens; < 2^31
  const std::int64_t* lengths;  // [batch]: tokens from there on become zeros; or null
};

struct SplitParams {
  SplitTensor tensors[3];
  int padded_dim;       // 64 or 128; columns from dim on become zeros
  unsigned* not_split;  // becomes 1 if an element is infinite, or so large that it rounds to infinity; NaN stays NaN
};

void launch_split(const SplitParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
