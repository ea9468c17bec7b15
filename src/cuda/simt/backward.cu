// Exact float32 gradients on ordinary cores: any strides, head sizes to 256, masks. What float32 runs.
//
// One kernel makes dK and dV, one dQ, both the same way: a block of threads keeps some rows of one side (keys or
// queries), and walks over the other side 32 rows at a time. A warp has a few of the block's rows, and a lane one of
// the 32; then, with probabilities passed around, a lane is every 32nd column of the gradients. Each gradient is added
// up by one thread in one order, so the bits are the same every time; the price is that scores are made twice.
#include <cmath>
#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/once.h"
#include "cuda/simt/launch.h"
#include "cuda/simt/rows.cuh"
#include "cuda/sm80/mask.cuh"
#include "cuda/sm80/reach.cuh"

namespace adaattn::cuda::simt {
namespace {

constexpr int kOthers = 32;

template <int kDim>
struct Tile {
  static constexpr int kWarpRows = kDim == 256 ? 2 : 4;  // with 2 it fits into the 99 KiB that smaller devices have
  static constexpr int kRows = kWarps * kWarpRows;
};

// Of both sides first what makes scores (q, k), then what makes dP (dout, v).
template <int kDim>
struct BackwardShared {
  alignas(16) float own[2][Tile<kDim>::kRows][kDim];
  alignas(16) float others[2][kOthers][kDim + 4];  // lanes read different rows: without the 4 all from the same banks
};

// delta = rowsum(dout out), a warp a row.
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ BackwardParams params) {
  const std::int64_t rows = static_cast<std::int64_t>(params.batch) * params.heads * params.query_count;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + warp; row < rows;
       row += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t query = row % params.query_count, head = row / params.query_count;
    const auto row_of = [&](const TensorView& view) {
      return view.data + head / params.heads * view.stride[0] + head % params.heads * view.stride[1] +
             query * view.stride[2];
    };
    const float *out = row_of(params.out), *dout = row_of(params.dout);
    float sum = 0.0f;
    for (int column = lane; column < params.dim_v; column += 32)
      sum = fmaf(out[column * params.out.stride[3]], dout[column * params.dout.stride[3]], sum);
    sum = warp_sum(sum);
    if (lane == 0) params.delta[row] = sum;
  }
}

// The others that some of the rows [first, end) see or are seen by: those in [0, sink_end) and in [begin, end).
struct Visits {
  int sink_end, begin, end;
};

template <bool kOfKeys>
__device__ __forceinline__ Visits visits_of(const sm80::Reach& reach, int first, int end) {
  if constexpr (kOfKeys) {
    if (first >= reach.key_count) return {0, 0, 0};
    const sm80::Queries of_first = sm80::queries_of(reach, first);
    const sm80::Queries of_last = sm80::queries_of(reach, min(end, reach.key_count) - 1);
    return {0, of_first.begin, max(of_first.end, of_last.end)};
  } else {
    const sm80::Keys keys = sm80::keys_of(reach, first, end - 1);
    return {keys.sink_end, keys.begin, keys.end};
  }
}

// A pair's probability and dS, from its score before the scale and its dP; both 0 if the query does not see the key.
struct Pair {
  float p = 0.0f, ds = 0.0f;
};

__device__ __forceinline__ Pair pair_of(const BackwardParams& params, const sm80::Reach& reach, int batch, int head,
                                        int query, int key, float score, float dp) {
  const sm80::Keys seen = sm80::keys_of(reach, query, query);
  if (query >= params.query_count || key >= seen.end || (key < seen.begin && key >= seen.sink_end)) return {};
  score *= params.scale;
  if (params.mask.data != nullptr) {
    const float term = sm80::mask_term<float>(params.mask, sm80::mask_offset(params.mask, batch, head, query, key));
    if (term == -INFINITY) return {};
    score += term;
  }
  const std::int64_t at = (static_cast<std::int64_t>(batch) * params.heads + head) * params.query_count + query;
  const float lse = params.lse[at], p = expf(score - (lse == -INFINITY ? INFINITY : lse));
  return {p, p * (dp - params.delta[at])};
}

// One row of a gradient times factor; sums[c] is column 32 c + lane.
template <int kCount>
__device__ __forceinline__ void store_row(const TensorView& view, int batch, int head, int row, int dim, float factor,
                                          const float (&sums)[kCount]) {
  float* to = view.data + batch * view.stride[0] + head * view.stride[1] + row * view.stride[2];
#pragma unroll
  for (int c = 0; c < kCount; ++c)
    if (const int column = 32 * c + static_cast<int>(threadIdx.x) % 32; column < dim)
      to[column * view.stride[3]] = sums[c] * factor;
}

// kOfKeys: the block's rows are keys, and it makes dK and dV; else they are queries, and it makes dQ.
template <int kDim, bool kOfKeys>
__global__ void __launch_bounds__(kThreads, kDim == 256 ? 1 : 2)
    gradient_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kWarpRows = Tile<kDim>::kWarpRows, kRows = Tile<kDim>::kRows, kColumns = kDim / 32;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<kDim>*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, first_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int padded_dim = (params.dim + 3) / 4 * 4, padded_dim_v = (params.dim_v + 3) / 4 * 4;
  const int own_heads = kOfKeys ? params.heads / params.group : params.heads;
  const int own_count = kOfKeys ? params.key_count : params.query_count;
  const std::int64_t tiles_per_head = (own_count + kRows - 1) / kRows;
  const std::int64_t tiles = tiles_per_head * params.batch * own_heads;
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int head = static_cast<int>(tile / tiles_per_head % own_heads);
    const int batch = static_cast<int>(tile / tiles_per_head / own_heads);
    // First keys and last queries have the most to do under a causal mask.
    const std::int64_t place = kOfKeys ? tile % tiles_per_head : tiles_per_head - 1 - tile % tiles_per_head;
    const int first_own = static_cast<int>(place) * kRows, end_own = min(first_own + kRows, own_count);
    const sm80::Reach reach = sm80::reach_of(params.visibility, params.bottom_right, params.key_lengths, batch,
                                             params.query_count, params.key_count);
    const Visits visits = visits_of<kOfKeys>(reach, first_own, end_own);
    const int end_read = kOfKeys ? min(end_own, reach.key_count) : end_own;
    __syncthreads();  // the last tile's rows are no longer read
    load_rows(shared.own[0], kOfKeys ? params.k : params.q, batch, head, first_own, end_read, params.dim, padded_dim);
    load_rows(shared.own[1], kOfKeys ? params.v : params.dout, batch, head, first_own, end_read, params.dim_v,
              padded_dim_v);

    float from_ds[kWarpRows][kColumns] = {}, from_p[kWarpRows][kColumns] = {};  // dK or dQ, and dV
    const int first_other_head = kOfKeys ? head * params.group : head / params.group;
    const int end_other_head = first_other_head + (kOfKeys ? params.group : 1);
    for (int other_head = first_other_head; other_head < end_other_head; ++other_head)
      for (int first = 0; first < visits.end; first += kOthers) {
        if (first >= visits.sink_end && first + kOthers <= visits.begin) continue;
        __syncthreads();
        load_rows(shared.others[0], kOfKeys ? params.q : params.k, batch, other_head, first, visits.end, params.dim,
                  kDim);
        load_rows(shared.others[1], kOfKeys ? params.dout : params.v, batch, other_head, first, visits.end,
                  params.dim_v, kDim);
        __syncthreads();

        float scores[kWarpRows] = {}, dp[kWarpRows] = {};
        add_products(scores, shared.own[0], first_row, shared.others[0], padded_dim);
        add_products(dp, shared.own[1], first_row, shared.others[1], padded_dim_v);
        Pair pairs[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const int own = first_own + first_row + r, other = first + lane;
          pairs[r] = pair_of(params, reach, batch, kOfKeys ? other_head : head, kOfKeys ? other : own,
                             kOfKeys ? own : other, scores[r], dp[r]);
        }
#pragma unroll 4
        for (int j = 0; j < kOthers; ++j) {
          Pair of_j[kWarpRows];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            of_j[r].ds = __shfl_sync(kAll, pairs[r].ds, j);
            if constexpr (kOfKeys) of_j[r].p = __shfl_sync(kAll, pairs[r].p, j);
          }
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float other = shared.others[0][j][32 * c + lane];
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) from_ds[r][c] = fmaf(of_j[r].ds, other, from_ds[r][c]);
            if constexpr (kOfKeys) {
              const float dout = shared.others[1][j][32 * c + lane];
#pragma unroll
              for (int r = 0; r < kWarpRows; ++r) from_p[r][c] = fmaf(of_j[r].p, dout, from_p[r][c]);
            }
          }
        }
      }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int own = first_own + first_row + r;
      if (own >= end_own) continue;
      store_row(kOfKeys ? params.dk : params.dq, batch, head, own, params.dim, params.scale, from_ds[r]);
      if constexpr (kOfKeys) store_row(params.dv, batch, head, own, params.dim_v, 1.0f, from_p[r]);
    }
  }
}

unsigned blocks_for(std::int64_t tiles) {
  constexpr std::int64_t kMost = 1 << 30;
  return static_cast<unsigned>(tiles < kMost ? tiles : kMost);
}

template <int kDim, bool kOfKeys>
void launch(const BackwardParams& params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BackwardShared<kDim>), kRows = Tile<kDim>::kRows;
  static_assert(kSharedBytes <= 99 * 1024, "what every device from sm_80 on has");
  static OncePerDevice prepared;
  prepared.run(current_device().index, [] {
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(gradient_kernel<kDim, kOfKeys>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            kSharedBytes));
  });
  const std::int64_t rows = kOfKeys ? params.key_count : params.query_count;
  const std::int64_t heads = std::int64_t{params.batch} * (kOfKeys ? params.heads / params.group : params.heads);
  const unsigned blocks = blocks_for((rows + kRows - 1) / kRows * heads);
  if (blocks == 0) return;
  gradient_kernel<kDim, kOfKeys><<<blocks, kThreads, kSharedBytes, stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

template <int kDim>
void launch_both(const BackwardParams& params, cudaStream_t stream) {
  launch<kDim, true>(params, stream);
  launch<kDim, false>(params, stream);
}

}  // namespace

void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  const std::int64_t rows = std::int64_t{params.batch} * params.heads * params.query_count;
  if (rows > 0) {
    delta_kernel<<<blocks_for((rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(params);
    ADAATTN_CUDA_CHECK(cudaGetLastError());
  }
  const int dim = params.dim > params.dim_v ? params.dim : params.dim_v;
  if (dim <= 64) return launch_both<64>(params, stream);
  if (dim <= 128) return launch_both<128>(params, stream);
  launch_both<256>(params, stream);
}

}  // namespace adaattn::cuda::simt
