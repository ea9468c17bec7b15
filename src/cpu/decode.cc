// Exact attention for few query rows. Their number does not fill vector lanes, so here the head dimension does: scores
// are dot products, and out += P V is the micro kernel with rows of P as its left side. Long rows are split over the
// threads and merged by their sums.
#include "cpu/decode.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/decode_plan.h"
#include "cpu/mask_terms-inl.h"
#include "cpu/non_finite.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/threads.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

// scores[key] = q . k[key]. Four keys at a time, so that their additions overlap.
HWY_INLINE void dot_keys(const float* HWY_RESTRICT q, const FloatRows& k, std::size_t keys, std::size_t width,
                         float* HWY_RESTRICT scores) {
  const FloatTag d;
  std::size_t key = 0;
  for (; key + 4 <= keys; key += 4) {
    const float* row = k.data + key * k.ld;
    FloatVector a = hn::Zero(d), b = hn::Zero(d), c = hn::Zero(d), e = hn::Zero(d);
    for (std::size_t at = 0; at < width; at += kVectorLanes) {
      const FloatVector part = hn::LoadU(d, q + at);
      a = hn::MulAdd(part, hn::LoadU(d, row + at), a);
      b = hn::MulAdd(part, hn::LoadU(d, row + k.ld + at), b);
      c = hn::MulAdd(part, hn::LoadU(d, row + 2 * k.ld + at), c);
      e = hn::MulAdd(part, hn::LoadU(d, row + 3 * k.ld + at), e);
    }
    scores[key] = hn::GetLane(hn::SumOfLanes(d, a));
    scores[key + 1] = hn::GetLane(hn::SumOfLanes(d, b));
    scores[key + 2] = hn::GetLane(hn::SumOfLanes(d, c));
    scores[key + 3] = hn::GetLane(hn::SumOfLanes(d, e));
  }
  for (; key < keys; ++key) {
    FloatVector a = hn::Zero(d);
    for (std::size_t at = 0; at < width; at += kVectorLanes)
      a = hn::MulAdd(hn::LoadU(d, q + at), hn::LoadU(d, k.data + key * k.ld + at), a);
    scores[key] = hn::GetLane(hn::SumOfLanes(d, a));
  }
}

// Applies visibility and mask to the scores of one row against the keys [first, first + keys). Returns whether any
// key is hidden.
HWY_INLINE bool hide_keys(const adaattn_forward_args& args, const Visibility& visibility, std::int64_t b,
                          std::int64_t h, std::int64_t i, std::int64_t first, std::size_t keys, float* scores) {
  const KeyRange range = visible_keys(visibility, i, i);
  const auto local = [&](std::int64_t key) {
    return static_cast<std::size_t>(clamp_index(key - first, 0, static_cast<std::int64_t>(keys)));
  };
  const std::size_t sink_end = local(range.sink_end), begin = local(range.begin), end = local(range.end);
  bool hidden = begin > sink_end || end < keys;
  std::fill(scores + sink_end, scores + std::max(begin, sink_end), kNegativeInfinity);
  std::fill(scores + std::max(end, sink_end), scores + keys, kNegativeInfinity);
  if (args.mask.data == nullptr) return hidden;
  const MaskRow row = mask_row(args.mask, b, h, i, first);
  for (std::size_t key = 0; key < keys; ++key) {
    const float term = mask_term(row, static_cast<std::int64_t>(key));
    hidden |= term == kNegativeInfinity;
    if (scores[key] != kNegativeInfinity) scores[key] = term == kNegativeInfinity ? term : scores[key] + term;
  }
  return hidden;
}

// Scores of one row to probabilities, in place, and the row's running values; out and compensation follow its
// reference.
HWY_INLINE void advance_row(float* scores, std::size_t keys, bool hidden, DecodeRow& row, float* out,
                            float* compensation, std::size_t width_v) {
  const FloatTag d;
  const std::size_t padded = (keys + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
  std::fill(scores + keys, scores + padded, kNegativeInfinity);
  FloatVector largest = hn::Set(d, kNegativeInfinity);
  for (std::size_t at = 0; at < padded; at += kVectorLanes) largest = hn::Max(largest, hn::LoadU(d, scores + at));
  const float top = hn::GetLane(hn::MaxOfLanes(d, largest));
  row.top = std::max(row.top, top);
  if (top * kLog2E > row.reference + RowState::kSlack) {
    const double now = static_cast<double>(top * kLog2E), factor = std::exp2(row.reference - now);
    row.moment = row.sum == 0 ? 0 : factor * (row.moment + (row.reference - now) * row.sum);
    row.sum *= factor;
    row.reference = now;
    for (std::size_t at = 0; at < width_v; ++at) out[at] *= static_cast<float>(factor);
    for (std::size_t at = 0; at < width_v; ++at) compensation[at] *= static_cast<float>(factor);
  }
  const FloatVector log2e = hn::Set(d, kLog2E), reference = hn::Set(d, static_cast<float>(row.reference));
  const FloatVector minus_infinity = hn::Set(d, kNegativeInfinity);
  FloatVector sum = hn::Zero(d), moment = hn::Zero(d);
  for (std::size_t at = 0; at < padded; at += kVectorLanes) {
    const FloatVector score = hn::LoadU(d, scores + at), x = hn::MulSub(score, log2e, reference);
    FloatVector p = exp2_near_zero(x), term = hn::Mul(p, x);
    if (hidden || at + kVectorLanes > keys) {
      const auto none = hn::Eq(score, minus_infinity);
      p = hn::IfThenZeroElse(none, p);
      term = hn::IfThenZeroElse(none, term);
    }
    hn::StoreU(p, d, scores + at);
    sum = hn::Add(sum, p);
    moment = hn::Add(moment, term);
  }
  row.sum += hn::GetLane(hn::SumOfLanes(d, sum));
  row.moment += hn::GetLane(hn::SumOfLanes(d, moment));
}

void decode_task(const DecodePlan& plan, std::int64_t task, const DecodeArrays& arrays, const DecodeScratch& scratch) {
  const adaattn_forward_args& args = *plan.args;
  const std::int64_t head = task / plan.splits, split = task % plan.splits, nq = args.q.shape[2], nk = args.k.shape[2];
  const std::int64_t b = head / args.k.shape[1], key_head = head % args.k.shape[1];
  const std::int64_t first_head = key_head * (args.q.shape[1] / args.k.shape[1]);
  const Visibility visibility =
      make_visibility(args.options, nq, args.key_lengths != nullptr ? args.key_lengths[b] : nk);
  const auto rows = static_cast<std::size_t>(plan.rows), dv = static_cast<std::size_t>(args.v.shape[3]);
  DecodeRow* state = arrays.rows + task * kMaxDecodeRows;
  float* out = arrays.out + task * kMaxDecodeRows * static_cast<std::int64_t>(plan.width_v);
  std::fill_n(out, rows * plan.width_v, 0.0F);
  std::fill_n(scratch.compensation, rows * plan.width_v, 0.0F);
  for (std::int64_t r = 0; r < plan.rows; ++r) {
    state[r] = {.reference = std::numeric_limits<float>::lowest(), .sum = 0, .moment = 0, .top = kNegativeInfinity};
    float* q = scratch.q + static_cast<std::size_t>(r) * plan.width;
    convert_rows(rows_of(args.q, b, first_head + r / nq, r % nq), 1, plan.width, q, plan.width);
    for (std::size_t at = 0; at < plan.width; ++at) q[at] *= plan.scale;
  }

  const KeyRange any = visible_keys(visibility, 0, nq - 1);
  constexpr auto kTile = static_cast<std::int64_t>(kKeyTile);
  const std::int64_t run_begin = plan.tiles * split / plan.splits * kTile;
  const std::int64_t run_end = std::min(plan.tiles * (split + 1) / plan.splits * kTile, any.end);
  for (std::int64_t begin = run_begin; begin < run_end; begin += kTile) {
    const std::int64_t end = std::min(begin + kTile, run_end);
    if (begin >= any.sink_end && end <= any.begin) continue;
    const auto keys = static_cast<std::size_t>(end - begin);
    const FloatRows k = float_rows(rows_of(args.k, b, key_head, begin), keys, plan.width, scratch.k);
    bool hidden = false;
    for (std::size_t r = 0; r < rows; ++r) {
      float* scores = scratch.scores + r * kKeyTile;
      dot_keys(scratch.q + r * plan.width, k, keys, plan.width, scores);
      const auto row = static_cast<std::int64_t>(r);
      const bool hides = hide_keys(args, visibility, b, first_head + row / nq, row % nq, begin, keys, scores);
      advance_row(scores, keys, hides, state[r], out + r * plan.width_v, scratch.compensation + r * plan.width_v,
                  plan.width_v);
      hidden |= hides;
    }
    FloatRows v = float_rows(rows_of(args.v, b, key_head, begin), keys, plan.width_v, scratch.v);
    if (hidden && !all_finite(v, keys, dv)) {
      add_non_finite(v.data, v.ld, keys, dv, rows, {scratch.scores, kKeyTile, 1}, {out, plan.width_v, 1});
      v = {clean_copy(v.data, v.ld, keys, dv, scratch.v_clean, plan.width_v), plan.width_v};
    }
    for (std::size_t lane = 0; lane < plan.width_v; lane += kPanelLanes) {
      AddCompensated add{out + lane, scratch.compensation + lane, plan.width_v};
      panel_gemm<ALayout::kRowMajor>(rows, scratch.scores, kKeyTile, v.data + lane, v.ld, keys, add);
    }
  }
}

// Merges the tasks of one query row (row counts through [B, Hk, rows]) and writes what the caller asked for.
void finish_decode_row(const DecodePlan& plan, std::int64_t row, const DecodeArrays& arrays) {
  const adaattn_forward_args& args = *plan.args;
  const std::int64_t head = row / plan.rows, r = row % plan.rows, nq = args.q.shape[2];
  const std::int64_t b = head / args.k.shape[1],
                     h = head % args.k.shape[1] * (args.q.shape[1] / args.k.shape[1]) + r / nq;
  const auto part = [&](std::int64_t split) { return (head * plan.splits + split) * kMaxDecodeRows + r; };
  DecodeRow whole = arrays.rows[part(0)];
  for (std::int64_t split = 1; split < plan.splits; ++split) {
    whole.reference = std::max(whole.reference, arrays.rows[part(split)].reference);
    whole.top = std::max(whole.top, arrays.rows[part(split)].top);
  }
  whole.sum = whole.moment = 0;
  float* total = arrays.out + part(0) * static_cast<std::int64_t>(plan.width_v);
  for (std::int64_t split = 0; split < plan.splits; ++split) {
    const DecodeRow& other = arrays.rows[part(split)];
    const double shift = other.reference - whole.reference, factor = std::exp2(shift);
    whole.sum += factor * other.sum;
    if (other.sum != 0) whole.moment += factor * (other.moment + shift * other.sum);
    const float* from = arrays.out + part(split) * static_cast<std::int64_t>(plan.width_v);
    for (std::size_t at = 0; at < plan.width_v; ++at)
      total[at] = (split == 0 ? 0.0F : total[at]) + static_cast<float>(factor) * from[at];
  }
  // Products that came out as -inf without a mask: no key counts, but their clamped exponentials were summed.
  if (whole.top == kNegativeInfinity && !std::isnan(whole.sum)) whole.sum = 0;
  constexpr double kLn2 = 0.69314718055994530942;
  const double log_sum = std::log(whole.sum);
  const float inverse = whole.sum == 0 ? 0.0F : static_cast<float>(1 / whole.sum);
  store_rows(total, plan.width_v, &inverse, 1, rows_of(args.out, b, h, r % nq));
  const std::int64_t at = (b * args.q.shape[1] + h) * nq + r % nq;
  if (args.lse != nullptr) args.lse[at] = static_cast<float>(whole.reference * kLn2 + log_sum);
  if (args.entropy != nullptr)
    args.entropy[at] =
        whole.sum == 0 ? 0.0F : static_cast<float>(std::max(0.0, log_sum - kLn2 * whole.moment / whole.sum));
  if (args.max_probability != nullptr)
    args.max_probability[at] =
        whole.sum == 0 ? 0.0F : static_cast<float>(std::exp(whole.top - whole.reference * kLn2) / whole.sum);
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(decode_task);
HWY_EXPORT(finish_decode_row);

std::size_t decode_workspace(const adaattn_forward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const DecodePlan plan = make_decode_plan(args, threads);
  Scratch scratch(nullptr);
  lay_out_shared(plan, scratch);
  for (int thread = 0; thread < threads; ++thread) lay_out_thread(plan, scratch);
  return scratch.bytes();
}

void decode(const adaattn_forward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const DecodePlan plan = make_decode_plan(args, threads);
#pragma omp parallel num_threads(threads_for(args.q, args.k, args.v, threads))
  {
    Scratch scratch(args.workspace);
    const DecodeArrays arrays = lay_out_shared(plan, scratch);
    DecodeScratch mine{};
    for (int thread = 0; thread <= omp_get_thread_num(); ++thread) mine = lay_out_thread(plan, scratch);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < plan.tasks; ++task) HWY_DYNAMIC_DISPATCH(decode_task)(plan, task, arrays, mine);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.tasks / plan.splits * plan.rows; ++row)
      HWY_DYNAMIC_DISPATCH(finish_decode_row)(plan, row, arrays);
  }
}

}  // namespace adaattn::cpu
#endif
