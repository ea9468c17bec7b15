// The pre-pass of 8-bit attention: keys as bytes with their scales, and float16 values as bfloat16, into the workspace.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/sm90/int8/config.h"

namespace adaattn::cuda::sm90 {

// A strided input of 16-bit elements, dim contiguous, rows on 16 bytes.
struct RowsView {
  const std::uint16_t* data;  // [batch, heads, tokens, dim]
  std::int64_t stride[3];     // in elements
  int heads, tokens, dim;     // dim a multiple of 8
};

struct PrepareParams {
  RowsView k, v;
  int batch;
  const std::int64_t* key_lengths;  // [batch] or null
  int padded_keys;
  int dim;  // what heads are padded to: 64 or 128
  bool bfloat16;
  float* key_mean;     // [batch, heads, dim]
  std::uint8_t* k8;    // [batch, heads, padded_keys, dim]
  KeyTile* tiles;      // [batch, heads, padded_keys / keys that share a scale]
  std::uint16_t* v16;  // [batch, heads, tokens, v.dim]; null: values are taken as they are
};

// One launch, or two. Reads each input once, and of k up to 64 rows more a tile, for the mean.
void launch_prepare(const PrepareParams& params, cudaStream_t stream);

}  // namespace adaattn::cuda::sm90
