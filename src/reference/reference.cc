// FP64 attention: one row at a time, the two-pass softmax, nothing clever.
#include "reference/reference.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/tensor.h"
#include "common/visibility.h"

namespace adaattn::reference {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

struct Row {
  std::vector<double> p;  // [nk] softmax of the row; all 0 if it sees no key
  double lse;
};

template <typename Args>
std::int64_t group_of(const Args& args) {  // query heads per key head
  return args.k.shape[1] == 0 ? 0 : args.q.shape[1] / args.k.shape[1];
}

template <typename Args>
double scale_of(const Args& args) {
  return args.options.has_scale != 0 ? args.options.scale : 1.0 / std::sqrt(static_cast<double>(args.q.shape[3]));
}

double mask_term(const adaattn_tensor& mask, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
  if (mask.data == nullptr) return 0;
  const std::int64_t at = broadcast_offset_of(mask, b, h, i, j);
  if (mask.dtype == ADAATTN_BOOL) return static_cast<const std::uint8_t*>(mask.data)[at] != 0 ? 0 : kMinusInfinity;
  return load_element(mask.data, at, mask.dtype);
}

template <typename Args>
Row softmax_row(const Args& args, std::int64_t b, std::int64_t h, std::int64_t i) {
  const std::int64_t nk = args.k.shape[2], group = group_of(args);
  const Visibility visibility =
      make_visibility(args.options, args.q.shape[2], args.key_lengths != nullptr ? args.key_lengths[b] : nk);
  Row row{.p = std::vector<double>(nk, kMinusInfinity), .lse = kMinusInfinity};
  double top = kMinusInfinity;
  for (std::int64_t j = 0; j < nk; ++j) {
    if (!sees(visibility, i, j)) continue;
    const double term = mask_term(args.mask, b, h, i, j);
    if (term == kMinusInfinity) continue;
    double dot = 0;
    for (std::int64_t d = 0; d < args.q.shape[3]; ++d)
      dot += static_cast<double>(load(args.q, b, h, i, d)) * load(args.k, b, h / group, j, d);
    row.p[j] = scale_of(args) * dot + term;
    if (!(row.p[j] <= top)) top = row.p[j];  // NaN wins
  }
  double sum = 0;
  for (double& p : row.p) sum += p = p == kMinusInfinity ? 0 : std::exp(p - top);
  if (sum == 0) return row;
  for (double& p : row.p) p /= sum;
  row.lse = top + std::log(sum);
  return row;
}

}  // namespace

void forward(const adaattn_forward_args& args, double* out, double* lse) {
  const std::int64_t batch = args.q.shape[0], heads = args.q.shape[1], nq = args.q.shape[2];
  const std::int64_t nk = args.k.shape[2], dv = args.v.shape[3], group = group_of(args);
#pragma omp parallel for collapse(3)
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < nq; ++i) {
        const Row row = softmax_row(args, b, h, i);
        const std::int64_t at = (b * heads + h) * nq + i;
        if (lse != nullptr) lse[at] = row.lse;
        if (out == nullptr) continue;
        for (std::int64_t c = 0; c < dv; ++c) out[at * dv + c] = 0;
        for (std::int64_t j = 0; j < nk; ++j)
          if (row.p[j] != 0)  // hidden keys do not count, not even as 0 * NaN
            for (std::int64_t c = 0; c < dv; ++c) out[at * dv + c] += row.p[j] * load(args.v, b, h / group, j, c);
      }
}

void statistics(const adaattn_forward_args& args, float* entropy, float* max_probability) {
  const std::int64_t batch = args.q.shape[0], heads = args.q.shape[1], nq = args.q.shape[2];
#pragma omp parallel for collapse(3)
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < nq; ++i) {
        double row_entropy = 0, top = 0;
        for (const double p : softmax_row(args, b, h, i).p) {
          if (p != 0) row_entropy -= p * std::log(p);
          if (!(p <= top)) top = p;  // NaN wins
        }
        const std::int64_t at = (b * heads + h) * nq + i;
        if (entropy != nullptr) entropy[at] = static_cast<float>(row_entropy);
        if (max_probability != nullptr) max_probability[at] = static_cast<float>(top);
      }
}

void backward(const adaattn_backward_args& args, double* dq, double* dk, double* dv) {
  const std::int64_t batch = args.q.shape[0], heads = args.q.shape[1], nq = args.q.shape[2], d = args.q.shape[3];
  const std::int64_t key_heads = args.k.shape[1], nk = args.k.shape[2], dim_v = args.v.shape[3];
  const std::int64_t group = group_of(args);
  const double scale = scale_of(args);
#pragma omp parallel for collapse(2)
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t g = 0; g < key_heads; ++g) {
      double* dk_head = dk + (b * key_heads + g) * nk * d;
      double* dv_head = dv + (b * key_heads + g) * nk * dim_v;
      for (std::int64_t x = 0; x < nk * d; ++x) dk_head[x] = 0;
      for (std::int64_t x = 0; x < nk * dim_v; ++x) dv_head[x] = 0;
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h)
        for (std::int64_t i = 0; i < nq; ++i) {
          const Row row = softmax_row(args, b, h, i);
          std::vector<double> dp(nk, 0.0);
          double delta = 0;  // sum_j p_j dp_j
          for (std::int64_t j = 0; j < nk; ++j) {
            if (row.p[j] == 0) continue;
            for (std::int64_t c = 0; c < dim_v; ++c) {
              const double grad = load(args.dout, b, h, i, c);
              dp[j] += grad * load(args.v, b, g, j, c);
              dv_head[j * dim_v + c] += row.p[j] * grad;
            }
            delta += row.p[j] * dp[j];
          }
          double* dq_row = dq + ((b * heads + h) * nq + i) * d;
          for (std::int64_t c = 0; c < d; ++c) dq_row[c] = 0;
          for (std::int64_t j = 0; j < nk; ++j) {
            const double ds = scale * row.p[j] * (dp[j] - delta);
            if (row.p[j] == 0) continue;
            for (std::int64_t c = 0; c < d; ++c) {
              dq_row[c] += ds * load(args.k, b, g, j, c);
              dk_head[j * d + c] += ds * load(args.q, b, h, i, c);
            }
          }
        }
    }
}

}  // namespace adaattn::reference
