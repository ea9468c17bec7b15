#include "cpu/double_rows.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/double_rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "common/visibility.h"
#include "cpu/forward_plan.h"
#include "cpu/rows.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

using DoubleTag = hn::ScalableTag<double>;
using HalfTag = hn::Rebind<float, DoubleTag>;  // as many float32

double dot(const double* a, const float* b, std::size_t count) {
  const DoubleTag d;
  const std::size_t lanes = hn::Lanes(d);
  auto sum = hn::Zero(d);
  std::size_t at = 0;
  for (; at + lanes <= count; at += lanes)
    sum = hn::MulAdd(hn::LoadU(d, a + at), hn::PromoteTo(d, hn::LoadU(HalfTag(), b + at)), sum);
  double result = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; at < count; ++at) result += a[at] * static_cast<double>(b[at]);
  return result;
}

void add_scaled(double factor, const float* from, std::size_t count, double* to) {
  const DoubleTag d;
  const std::size_t lanes = hn::Lanes(d);
  const auto scale = hn::Set(d, factor);
  std::size_t at = 0;
  for (; at + lanes <= count; at += lanes)
    hn::StoreU(hn::MulAdd(scale, hn::PromoteTo(d, hn::LoadU(HalfTag(), from + at)), hn::LoadU(d, to + at)), d, to + at);
  for (; at < count; ++at) to[at] += factor * static_cast<double>(from[at]);
}

// visit(key, its row as float32) for the first keys of k or v.
template <class Visit>
void for_each_key(const adaattn_tensor& tensor, std::int64_t keys, float* scratch, Visit visit) {
  const auto dim = static_cast<std::size_t>(tensor.shape[3]);
  for (std::int64_t first = 0; first < keys; first += static_cast<std::int64_t>(kKeyTile)) {
    const auto count = static_cast<std::size_t>(std::min(static_cast<std::int64_t>(kKeyTile), keys - first));
    const FloatRows rows = float_rows(rows_of(tensor, 0, 0, first), count, dim, scratch);
    for (std::size_t key = 0; key < count; ++key)
      visit(first + static_cast<std::int64_t>(key), rows.data + key * rows.ld);
  }
}

}  // namespace

void double_rows(const adaattn_forward_args& head, std::int64_t first, const DoubleScratch& scratch, double* out,
                 double* lse) {
  const auto dim = static_cast<std::size_t>(head.q.shape[3]), dv = static_cast<std::size_t>(head.v.shape[3]);
  const std::int64_t nk = head.k.shape[2], count = std::min(kDoubleRows, head.q.shape[2] - first);
  const double scale = head.options.has_scale != 0 ? head.options.scale : 1 / std::sqrt(static_cast<double>(dim));
  const Visibility visibility =
      make_visibility(head.options, head.q.shape[2], head.key_lengths != nullptr ? *head.key_lengths : nk);
  std::int64_t seen[kDoubleRows], most = 0;
  for (std::int64_t row = 0; row < count; ++row) {
    seen[row] = std::max<std::int64_t>(0, visible_keys(visibility, first + row, first + row).end);
    most = std::max(most, seen[row]);
    for (std::size_t c = 0; c < dim; ++c)
      scratch.q[static_cast<std::size_t>(row) * dim + c] =
          static_cast<double>(load(head.q, 0, 0, first + row, static_cast<std::int64_t>(c)));
  }
  const auto score = [&](std::int64_t row, std::int64_t key) -> double& { return scratch.scores[row * nk + key]; };
  for_each_key(head.k, most, scratch.tile, [&](std::int64_t key, const float* k) {
    for (std::int64_t row = 0; row < count; ++row)
      if (key < seen[row]) score(row, key) = scale * dot(scratch.q + static_cast<std::size_t>(row) * dim, k, dim);
  });
  for (std::int64_t row = 0; row < count; ++row) {
    double* const p = &score(row, 0);
    const double top = seen[row] > 0 ? *std::max_element(p, p + seen[row]) : 0;
    double sum = 0, largest = 0, entropy = 0;
    for (std::int64_t key = 0; key < seen[row]; ++key) sum += p[key] = std::exp(p[key] - top);
    for (std::int64_t key = 0; key < seen[row]; ++key) {
      p[key] /= sum;
      largest = std::max(largest, p[key]);
      if (head.entropy != nullptr && p[key] > 0) entropy -= p[key] * std::log(p[key]);
    }
    lse[first + row] = seen[row] > 0 ? top + std::log(sum) : -HUGE_VAL;
    if (head.entropy != nullptr) head.entropy[first + row] = static_cast<float>(entropy);
    if (head.max_probability != nullptr) head.max_probability[first + row] = static_cast<float>(largest);
  }
  std::fill_n(out + static_cast<std::size_t>(first) * dv, static_cast<std::size_t>(count) * dv, 0.0);
  for_each_key(head.v, most, scratch.tile, [&](std::int64_t key, const float* v) {
    for (std::int64_t row = 0; row < count; ++row)
      if (key < seen[row] && score(row, key) != 0)
        add_scaled(score(row, key), v, dv, out + static_cast<std::size_t>(first + row) * dv);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(double_rows);

DoubleScratch lay_out_double_rows(const adaattn_forward_args& args, Scratch& scratch) {
  const auto rows = static_cast<std::size_t>(kDoubleRows), d = static_cast<std::size_t>(args.q.shape[3]);
  return {.scores = scratch.take<double>(rows * static_cast<std::size_t>(args.k.shape[2])),
          .q = scratch.take<double>(rows * d),
          .tile = scratch.take<float>(kKeyTile * std::max(d, static_cast<std::size_t>(args.v.shape[3])))};
}

void run_double_rows(const adaattn_forward_args& head, std::int64_t first, const DoubleScratch& scratch, double* out,
                     double* lse) {
  HWY_DYNAMIC_DISPATCH(double_rows)(head, first, scratch, out, lse);
}

}  // namespace adaattn::cpu
#endif
