// The screen's basis: gram matrices of sampled q and k, then a randomized subspace iteration (Halko, Martinsson and
// Tropp, arXiv 0909.4061, algorithm 4.4) for the top eigenvectors of gram_q gram_k, orthonormal under gram_k.
//
// Two thread blocks a key head, a cluster: one sums the gram of keys, the other that of queries and hands it over.
// With 512 rows and two iterations it held within 1 % of the energy that the best basis of all rows holds (heads of
// SmolLM2 and of a model of 128 dimensions a head, simulated); one iteration, as here, 0.1 to 0.6 % less (random
// heads).
#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/once.h"
#include "cuda/common/ptx/cp_async.cuh"
#include "cuda/sm90/adaptive/basis.h"
#include "cuda/sm90/adaptive/basis_algebra.cuh"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int kSampled = 512;  // rows of k, and of q in all heads of the group
constexpr int kPortions = 4;   // that are summed as they arrive
constexpr int kPasses = 2;     // of orthonormalisation
// Below this share of their energy keys that are all but equal leave rounding errors alone after their mean is gone.
constexpr float kLeastSpread = 1e-5F;

template <int kDim>
struct BasisMemory {
  union {
    alignas(128) std::uint16_t rows[kSampled * kDim];
    struct {
      RankRows<kDim> y, t;
      float products[kScreenRank * kScreenRank];
      Factor factor;
    };
  };
  uint4 gram_q[2][kDim / 16][kDim * 2];  // [high or low][step][thread]
  float column_sums[kDim];
  float parts[3][kDim / 16];  // sums of warps
  float trace_q;
};

__device__ __forceinline__ unsigned scramble(unsigned x) {  // no pattern that data has
  x = (x ^ x >> 16) * 0x7FEB352DU;
  x = (x ^ x >> 15) * 0x846CA68BU;
  return x ^ x >> 16;
}

// The sum of all threads' values, in each thread, the same on every run. A barrier lies between.
template <int kWarps>
__device__ __forceinline__ float sum_over_block(float x, float* parts) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFU, x, lanes);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp];
  return sum;
}

// Issues the copies of the sample, in portions: of k, or of q taking turns between the heads of the group. Each row
// lies at random in its share of the tokens.
template <int kDim>
__device__ __forceinline__ void load_sample(const AdaptiveShape& shape, const Rows16& from, bool of_q, int key_head,
                                            std::uint16_t* to) {
  constexpr int kPieces = kDim / 8, kThreads = kDim * 2, kRows = kThreads / kPieces;
  const int key_heads = shape.heads / shape.group, batch = key_head / key_heads, head = key_head % key_heads;
  const int members = of_q ? shape.group : 1, tokens = of_q ? shape.queries : shape.keys;
  const int shares = (kSampled + members - 1) / members;
  const auto step = (static_cast<std::uint64_t>(tokens) << 32) / static_cast<unsigned>(shares);
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const bool exists = piece * 8 < shape.dim_qk;
  const std::uint32_t base = ptx::shared_address(to);
  for (int portion = 0; portion < kPortions; ++portion) {
    for (int r = static_cast<int>(threadIdx.x) / kPieces; r < kSampled / kPortions; r += kRows) {
      const int row = portion * (kSampled / kPortions) + r, share = row / members;
      const auto begin = static_cast<unsigned>(share * step >> 32),
                 end = static_cast<unsigned>((share + 1) * step >> 32);
      const unsigned token = begin + __umulhi(scramble(static_cast<unsigned>(row)), end - begin);
      const HeadRows rows(from, batch, head * members + row % members);
      const std::uint16_t* source = rows.row(static_cast<int>(token)) + (exists ? piece * 8 : 0);
      ptx::copy_16_bytes(base + piece_offset<kDim>(row, piece), source, exists);
    }
    ptx::commit_copies();
  }
}

// Columns 8 t on of the warp's 16 rows of x^T x over a portion of the sample, and its rows' sums.
template <int kDim, typename T>
__device__ __forceinline__ void add_gram(const std::uint16_t* rows, int portion, int warp, int lane,
                                         float (&gram)[kDim / 8][4], float (&sums)[4]) {
  const std::uint32_t base = ptx::shared_address(rows);
  const std::uint32_t one = ptx::pack<T>(1, 1), ones[2] = {one, one};
#pragma unroll 2
  for (int row = portion * (kSampled / kPortions); row < (portion + 1) * (kSampled / kPortions); row += 16) {
    std::uint32_t a[4];
    ptx::load_matrices_transposed(a, base + offset_a_transposed<kDim>(row, warp * 2, lane));
    ptx::multiply_add<T>(sums, a, ones);
#pragma unroll
    for (int pair = 0; pair < kDim / 16; ++pair) {
      std::uint32_t b[4];
      ptx::load_matrices_transposed(b, base + offset_b_transposed<kDim>(row, pair * 2, lane));
      ptx::multiply_add<T>(gram[pair * 2], a, b);
      ptx::multiply_add<T>(gram[pair * 2 + 1], a, b + 2);
    }
  }
}

template <int kDim>
__device__ __forceinline__ GramRows<kDim> split(const float (&gram)[kDim / 8][4], float factor) {
  GramRows<kDim> to;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = gram[step * 2 + i / 2] + i % 2 * 2;
      split_pair(pair[0] * factor, pair[1] * factor, to.high[step][i], to.low[step][i]);
    }
  return to;
}

// This thread's part of the trace of a b^T.
template <int kDim>
__device__ __forceinline__ float dot(const GramRows<kDim>& a, const GramRows<kDim>& b) {
  float sum = 0;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum += (low_half(a.high[step][i]) + low_half(a.low[step][i])) *
             (low_half(b.high[step][i]) + low_half(b.low[step][i]));
      sum += (high_half(a.high[step][i]) + high_half(a.low[step][i])) *
             (high_half(b.high[step][i]) + high_half(b.low[step][i]));
    }
  return sum;
}

// Writes what there is for a head without a basis.
template <int kDim>
__device__ void write_none(float energy, int key_head, const AdaptiveArrays& to) {
  for (int at = static_cast<int>(threadIdx.x); at < kScreenRank * kDim; at += kDim * 2)
    to.y[std::int64_t{key_head} * kScreenRank * kDim + at] = to.z[std::int64_t{key_head} * kScreenRank * kDim + at] = 0;
  if (threadIdx.x < kScreenRank) to.y_means[key_head * kScreenRank + static_cast<int>(threadIdx.x)] = 0;
  if (threadIdx.x == 0) to.energy[key_head] = energy;
}

// Whether nothing needs to be known of a key head's queries.
__device__ bool all_given_dense(const AdaptiveShape& shape, const AdaptiveArrays& to, int key_head) {
  bool all = to.given != nullptr;
  for (int member = 0; all && member < shape.group; ++member)
    all = to.given[key_head * shape.group + member] == kLevels - 1;
  return all;
}

template <int kDim, typename T>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kDim * 2, 1)
    basis_kernel(AdaptiveShape shape, Rows16 q, Rows16 k, AdaptiveArrays to) {
  namespace groups = cooperative_groups;
  constexpr int kWarps = kDim / 16;
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<BasisMemory<kDim>*>(memory);
  const auto cluster = groups::this_cluster();
  const bool of_q = cluster.block_rank() == 1;
  const int key_head = static_cast<int>(blockIdx.x) / 2, warp = static_cast<int>(threadIdx.x) / 32,
            lane = static_cast<int>(threadIdx.x) % 32;

  if (all_given_dense(shape, to, key_head)) {  // in both blocks
    if (!of_q && threadIdx.x == 0) to.not_finite[key_head] = 0;
    if (!of_q) write_none<kDim>(0, key_head, to);
    return;
  }
  load_sample<kDim>(shape, of_q ? q : k, of_q, key_head, shared.rows);
  float gram[kDim / 8][4] = {}, sums[4] = {};
  ptx::wait_copies<3>();
  __syncthreads();
  add_gram<kDim, T>(shared.rows, 0, warp, lane, gram, sums);
  ptx::wait_copies<2>();
  __syncthreads();
  add_gram<kDim, T>(shared.rows, 1, warp, lane, gram, sums);
  ptx::wait_copies<1>();
  __syncthreads();
  add_gram<kDim, T>(shared.rows, 2, warp, lane, gram, sums);
  ptx::wait_copies<0>();
  __syncthreads();
  add_gram<kDim, T>(shared.rows, 3, warp, lane, gram, sums);

  if (lane % 4 == 0) {
    shared.column_sums[warp * 16 + lane / 4] = sums[0];
    shared.column_sums[warp * 16 + lane / 4 + 8] = sums[2];
  }
  __syncthreads();  // also the last use of the rows
  float trace = 0, raw_trace = 0;
#pragma unroll
  for (int t = 0; t < kDim / 8; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = t * 8 + lane % 4 * 2 + e % 2, row = warp * 16 + lane / 4 + e / 2 * 8;
      if (row == column) raw_trace += gram[t][e];
      if (!of_q) gram[t][e] -= sums[e / 2 * 2] * shared.column_sums[column] * (1.0F / kSampled);
      if (row == column) trace += gram[t][e];
    }
  trace = sum_over_block<kWarps>(trace, shared.parts[0]);
  raw_trace = sum_over_block<kWarps>(raw_trace, shared.parts[1]);
  const float factor = trace > 0 ? kDim / trace : 0.0F;  // eigenvalues are about 1
  const GramRows<kDim> own = split<kDim>(gram, factor);

  if (of_q) {
    auto& other = *cluster.map_shared_rank(&shared, 0);
    // The other block runs: it takes part in this barrier.
    cluster.sync();
#pragma unroll
    for (int step = 0; step < kWarps; ++step) {
      const std::uint32_t(&high)[4] = own.high[step], (&low)[4] = own.low[step];
      other.gram_q[0][step][threadIdx.x] = {high[0], high[1], high[2], high[3]};
      other.gram_q[1][step][threadIdx.x] = {low[0], low[1], low[2], low[3]};
    }
    if (threadIdx.x == 0) other.trace_q = trace;
    cluster.sync();
    return;
  }
  cluster.sync();
  for (int at = static_cast<int>(threadIdx.x); at < kScreenRank * kDim; at += kDim * 2)
    shared.y.set_split(at / kDim, at % kDim, (scramble(static_cast<unsigned>(at)) & 1) != 0 ? 1.0F : -1.0F);
  cluster.sync();
  if (threadIdx.x == 0) to.not_finite[key_head] = 0;
  const bool finite = isfinite(trace) && isfinite(raw_trace) && isfinite(shared.trace_q);
  if (!finite || !(trace > kLeastSpread * raw_trace)) {
    write_none<kDim>(finite ? 0.0F : __int_as_float(0x7FC00000), key_head, to);
    return;
  }
  GramRows<kDim> gram_q;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const uint4 high = shared.gram_q[0][step][threadIdx.x], low = shared.gram_q[1][step][threadIdx.x];
    gram_q.high[step][0] = high.x, gram_q.high[step][1] = high.y, gram_q.high[step][2] = high.z;
    gram_q.high[step][3] = high.w, gram_q.low[step][0] = low.x, gram_q.low[step][1] = low.y;
    gram_q.low[step][2] = low.z, gram_q.low[step][3] = low.w;
  }

  // y: the candidates, random signs at first; t = y gram_k. y = t gram_q, then made orthonormal, twice for rounding.
  const auto multiply_into = [&](const GramRows<kDim>& by, const RankRows<kDim>& x, RankRows<kDim>& result) {
    float products[4][4];
    multiply<kDim>(by, x, lane, products);
    store<kDim>(products, warp, lane, result);
    __syncthreads();
  };
  multiply_into(own, shared.y, shared.t);
  multiply_into(gram_q, shared.t, shared.y);
  multiply_into(own, shared.y, shared.t);
  const int dim = static_cast<int>(threadIdx.x) % kDim;
  const bool holds_y = threadIdx.x >= kDim;
  float column[kScreenRank];  // of t, or of y
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const bool last = pass == kPasses - 1;
    multiply_rows<kDim>(shared.y, shared.t, warp, lane, shared.products);
    __syncthreads();
    // Of rows that were orthonormal before rounding, those that now are not hold nothing.
    if (warp == 0) factorize(shared.products, last ? 1e-2F : 1e-6F, last, lane, shared.factor);
    __syncthreads();
    RankRows<kDim>& rows = holds_y ? shared.y : shared.t;
    solve<kDim>(shared.factor, rows, dim, column);
#pragma unroll
    for (int j = 0; j < kScreenRank; ++j) {
      rows.set_split(j, dim, column[j]);
      rows.exact[j * RankRows<kDim>::kStride + dim] = column[j];  // what the next pass solves for, of y
    }
    __syncthreads();
    if (!last) multiply_into(own, shared.y, shared.t);
  }

  // t gram_q t^T is the energy of the product.
  float held = 0;
  {
    float products[4][4];
    multiply<kDim>(gram_q, shared.t, lane, products);
#pragma unroll
    for (int j = 0; j < kScreenRank; ++j)
      if (!holds_y) shared.t.exact[j * RankRows<kDim>::kStride + dim] = column[j];
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        held +=
            products[t][e] *
            shared.t.exact[(t * 8 + lane % 4 * 2 + e % 2) * RankRows<kDim>::kStride + warp * 16 + lane / 4 + e / 2 * 8];
  }
  held = sum_over_block<kWarps>(held, shared.parts[0]);
  const float all = sum_over_block<kWarps>(dot(own, gram_q), shared.parts[2]);
  if (threadIdx.x == 0) to.energy[key_head] = all > 0 ? held / all : 1.0F;

  const float length = sqrtf(kSampled * factor);  // y (gram_k / factor) y^T = n
  T* out = reinterpret_cast<T*>(holds_y ? to.y : to.z) + std::int64_t{key_head} * kScreenRank * kDim + dim;
#pragma unroll
  for (int j = 0; j < kScreenRank; ++j) {
    const T x = from_float<T>(column[j] * (holds_y ? length : shape.scale_log2 / length));
    out[j * kDim] = x;
    if (holds_y) shared.y.exact[j * RankRows<kDim>::kStride + dim] = static_cast<float>(x);
  }
  __syncthreads();
  constexpr int kParts = kDim * 2 / kScreenRank;  // threads of a rank
  const int rank = static_cast<int>(threadIdx.x) / kParts;
  float mean = 0;
  for (int at = static_cast<int>(threadIdx.x) % kParts; at < kDim; at += kParts)
    mean += shared.y.exact[rank * RankRows<kDim>::kStride + at] * shared.column_sums[at];
#pragma unroll
  for (int lanes = kParts / 2; lanes > 0; lanes /= 2) mean += __shfl_xor_sync(0xFFFFFFFFU, mean, lanes);
  if (threadIdx.x % kParts == 0) to.y_means[key_head * kScreenRank + rank] = mean * (1.0F / kSampled);
}

template <int kDim, typename T>
void launch(const AdaptiveShape& shape, const Rows16& q, const Rows16& k, const AdaptiveArrays& to,
            cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BasisMemory<kDim>);
  static_assert(kSharedBytes <= 227 * 1024);
  static OncePerDevice prepared;
  prepared.run(current_device().index, [] {
    ADAATTN_CUDA_CHECK(
        cudaFuncSetAttribute(basis_kernel<kDim, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  });
  basis_kernel<kDim, T>
      <<<static_cast<unsigned>(shape.key_heads() * 2), kDim * 2, kSharedBytes, stream>>>(shape, q, k, to);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_basis(const AdaptiveShape& shape, Rows16 q, Rows16 k, const AdaptiveArrays& to, cudaStream_t stream) {
  if (shape.dim == 64)
    shape.bfloat16 ? launch<64, __nv_bfloat16>(shape, q, k, to, stream) : launch<64, __half>(shape, q, k, to, stream);
  else
    shape.bfloat16 ? launch<128, __nv_bfloat16>(shape, q, k, to, stream) : launch<128, __half>(shape, q, k, to, stream);
}

}  // namespace adaattn::cuda::sm90
