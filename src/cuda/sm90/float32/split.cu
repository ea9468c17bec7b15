// x = high + low + at most 2^-18 |x|: high is x rounded to bfloat16, low what is left of it. A row holds all of high,
// then all of low, so that a copy of columns brings either.
#include <algorithm>

#include "cuda/common/check.h"
#include "cuda/sm90/float32/split.h"
#include "cuda/sm90/registers.cuh"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kThreads = 256, kPieces = 8;  // elements that a thread splits at a time

__device__ __forceinline__ bool is_infinite(std::uint32_t bfloat16_pair) {
  return (bfloat16_pair & 0x7FFFu) == 0x7F80u || (bfloat16_pair & 0x7FFF0000u) == 0x7F800000u;
}

__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ SplitParams params) {
  const SplitTensor& tensor = params.tensors[blockIdx.y];
  const int pieces = params.padded_dim / kPieces;  // 8 or 16
  const auto tokens = static_cast<unsigned>(tensor.tokens), heads = static_cast<unsigned>(tensor.heads);
  const std::int64_t count = tensor.rows * pieces;
  bool infinite = false;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const auto row =
        static_cast<unsigned>(i >> (pieces == 8 ? 3 : 4));  // divisions in 32 bits: they take a third as long
    const unsigned head_row = row / tokens, token = row % tokens, batch = head_row / heads, head = head_row % heads;
    const int column = (static_cast<int>(i) & (pieces - 1)) * kPieces;
    float values[kPieces] = {};
    if (column < tensor.dim && (tensor.lengths == nullptr || token < tensor.lengths[batch])) {
      const auto* from = reinterpret_cast<const float4*>(tensor.from + batch * tensor.stride[0] +
                                                         head * tensor.stride[1] + token * tensor.stride[2] + column);
      reinterpret_cast<float4*>(values)[0] = from[0];
      reinterpret_cast<float4*>(values)[1] = from[1];
    }
    std::uint32_t words[kPieces];  // four of high, four of low
    pack_operand<__nv_bfloat16>(words, values);
#pragma unroll
    for (int word = 0; word < kPieces / 2; ++word) infinite |= is_infinite(words[word]);
    auto* to = static_cast<std::uint16_t*>(tensor.to) + std::int64_t{row} * 2 * params.padded_dim + column;
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint4*>(to + params.padded_dim) = make_uint4(words[4], words[5], words[6], words[7]);
  }
  if (infinite) *params.not_split = 1;  // whoever writes it writes the same
}

}  // namespace

void launch_split(const SplitParams& params, int multiprocessors, cudaStream_t stream) {
  std::int64_t rows = 0;
  for (const SplitTensor& tensor : params.tensors) rows = std::max(rows, tensor.rows);
  const std::int64_t wanted = (rows * (params.padded_dim / kPieces) + kThreads - 1) / kThreads;
  const auto blocks = static_cast<unsigned>(std::clamp<std::int64_t>(wanted, 1, multiprocessors * 8));
  split_kernel<<<dim3(blocks, 3), kThreads, 0, stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace adaattn::cuda::sm90
