// Exact gradients on the CPU (FlashAttention-2's recomputation, arXiv 2307.08691, algorithm 2), one source for every
// instruction set. Per tile of keys and block of queries, with P and dS held as [key][query]:
//   S^T = K Q^T, P = exp(S - lse), dP^T = V dO^T, dS = P (dP - delta), dV += P dO, dK += dS Q, dQ += dS^T K
// Each product is the same micro kernel; only dQ's reads its left side transposed.
#include "cpu/backward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/backward_plan.h"
#include "cpu/gradient-inl.h"
#include "cpu/mask_terms-inl.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "cpu/threads.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

struct KeyTileGradient {
  std::int64_t first, end;
  FloatRows k, v;
};

// One block of queries (rows of one head) against one tile of keys.
HWY_NOINLINE void add_block(const BackwardPlan& plan, const BackwardArrays& arrays, const BackwardScratch& scratch,
                            const Visibility& visibility, const PanelRows& block, const KeyTileGradient& tile,
                            float* dq) {
  const FloatTag d;
  const adaattn_backward_args& args = *plan.args;
  const TileView view = view_tile(visibility, block, tile.first, tile.end);
  if (view.begin >= view.end) return;
  const auto offset = static_cast<std::size_t>(view.begin - tile.first);
  const auto keys = static_cast<std::size_t>(view.end - view.begin), queries = static_cast<std::size_t>(block.count);
  const auto dim = static_cast<std::size_t>(args.q.shape[3]), dim_v = static_cast<std::size_t>(args.v.shape[3]);
  const FloatRows k = {tile.k.data + offset * tile.k.ld, tile.k.ld}, v = {tile.v.data + offset * tile.v.ld, tile.v.ld};
  const FloatRows q =
      float_rows(rows_of(args.q, block.b, block.first_head, block.first), queries, plan.width, scratch.q);
  const FloatRows dout =
      float_rows(rows_of(args.dout, block.b, block.first_head, block.first), queries, plan.width_v, scratch.dout);
  const std::int64_t first_row = (block.b * args.q.shape[1] + block.first_head) * block.nq + block.first;

  for (std::size_t lane = 0; lane < queries; lane += kPanelLanes) {
    PanelRows rows = block;
    rows.first += static_cast<std::int64_t>(lane);
    rows.count = std::min(static_cast<std::int64_t>(kPanelLanes), block.count - static_cast<std::int64_t>(lane));
    const auto count = static_cast<std::size_t>(rows.count);
    float* q_panel = scratch.q_panels;
    float* dout_panel = scratch.dout_panels;
    if (count < kPanelLanes) {
      std::fill_n(q_panel, dim * kPanelLanes, 0.0F);
      std::fill_n(dout_panel, dim_v * kPanelLanes, 0.0F);
    }
    transpose(q.data + lane * q.ld, q.ld, count, dim, plan.scale, q_panel, kPanelLanes);
    transpose(dout.data + lane * dout.ld, dout.ld, count, dim_v, 1.0F, dout_panel, kPanelLanes);
    float reference[kPanelLanes] = {}, delta[kPanelLanes] = {};
    std::copy_n(arrays.reference + first_row + static_cast<std::int64_t>(lane), count, reference);
    std::copy_n(arrays.delta + first_row + static_cast<std::int64_t>(lane), count, delta);

    Pair top = {hn::Zero(d), hn::Zero(d)};
    StoreScores store_scores{scratch.scores, &top};
    panel_gemm<ALayout::kRowMajor>(keys, k.data, k.ld, q_panel, kPanelLanes, dim, store_scores);
    MaskEffect effect = MaskEffect::kNone;
    if (args.mask.data != nullptr)
      effect = fill_mask_terms(args.mask, rows, view.begin, keys, scratch.row_terms, scratch.terms);
    const TileView own = view_tile(visibility, rows, tile.first, tile.end);
    if (effect == MaskEffect::kHidesAll) {
      for (std::size_t key = 0; key < keys; ++key)
        store_pair({hn::Zero(d), hn::Zero(d)}, scratch.p + key * kGradientQueries + lane);
    } else if (own.all_visible && own.begin == view.begin && own.end == view.end && effect == MaskEffect::kNone) {
      recompute_probabilities<false>(scratch.scores, keys, load_pair(reference), scratch.p + lane, kGradientQueries);
    } else {
      const LaneBounds<kPanelLanes> bounds(visibility, rows, tile.first);
      mask_scores(scratch.scores, keys, static_cast<std::int32_t>(offset), bounds,
                  effect == MaskEffect::kSome ? scratch.terms : nullptr);
      recompute_probabilities<true>(scratch.scores, keys, load_pair(reference), scratch.p + lane, kGradientQueries);
    }
    StoreScoreGradient store_gradient{scratch.p + lane, scratch.ds + lane, kGradientQueries, load_pair(delta)};
    panel_gemm<ALayout::kRowMajor>(keys, v.data, v.ld, dout_panel, kPanelLanes, dim_v, store_gradient);
  }

  add_product<ALayout::kRowMajor>(keys, scratch.p, kGradientQueries, dout, queries, scratch.dv + offset * plan.width_v,
                                  plan.width_v);
  add_product<ALayout::kRowMajor>(keys, scratch.ds, kGradientQueries, q, queries, scratch.dk + offset * plan.width,
                                  plan.width);
  add_product<ALayout::kTransposed>(queries, scratch.ds, kGradientQueries, k, keys,
                                    dq + first_row * static_cast<std::int64_t>(plan.width), plan.width);
}

void backward_task(const BackwardPlan& plan, std::int64_t task, const BackwardArrays& arrays,
                   const BackwardScratch& scratch) {
  const adaattn_backward_args& args = *plan.args;
  const std::int64_t head = task / plan.splits, split = task % plan.splits;
  const std::int64_t b = head / args.k.shape[1], key_head = head % args.k.shape[1];
  const std::int64_t nq = args.q.shape[2], nk = args.k.shape[2], first_head = key_head * plan.group;
  const Visibility visibility =
      make_visibility(args.options, nq, args.key_lengths != nullptr ? args.key_lengths[b] : nk);
  float* dq = arrays.dq + split * plan.rows * static_cast<std::int64_t>(plan.width);
  std::fill_n(dq + (b * args.q.shape[1] + first_head) * nq * static_cast<std::int64_t>(plan.width),
              plan.group * nq * static_cast<std::int64_t>(plan.width), 0.0F);
  constexpr auto kKeys = static_cast<std::int64_t>(kGradientKeys),
                 kQueries = static_cast<std::int64_t>(kGradientQueries);
  for (std::int64_t index = split; index < plan.tiles; index += plan.splits) {
    const std::int64_t begin = index * kKeys, end = std::min(begin + kKeys, nk);
    const auto keys = static_cast<std::size_t>(end - begin);
    const std::int64_t read_end = std::clamp(visibility.key_count, begin, end);  // keys past the length are never read
    const KeyTileGradient tile = {.first = begin,
                                  .end = end,
                                  .k = float_rows(rows_of(args.k, b, key_head, begin),
                                                  static_cast<std::size_t>(read_end - begin), plan.width, scratch.k),
                                  .v = float_rows(rows_of(args.v, b, key_head, begin),
                                                  static_cast<std::size_t>(read_end - begin), plan.width_v, scratch.v)};
    std::fill_n(scratch.dk, keys * plan.width, 0.0F);
    std::fill_n(scratch.dv, keys * plan.width_v, 0.0F);
    for (std::int64_t h = first_head; h < first_head + plan.group; ++h)
      for (std::int64_t i = 0; i < nq; i += kQueries)
        add_block(plan, arrays, scratch, visibility,
                  {.b = b, .first_head = h, .nq = nq, .first = i, .count = std::min(kQueries, nq - i)}, tile, dq);
    std::fill_n(scratch.factors, keys, plan.scale);
    store_rows(scratch.dk, plan.width, scratch.factors, keys, rows_of(args.dk, b, key_head, begin));
    std::fill_n(scratch.factors, keys, 1.0F);
    store_rows(scratch.dv, plan.width_v, scratch.factors, keys, rows_of(args.dv, b, key_head, begin));
  }
}

// delta and reference of one row of queries.
void prepare_row(const BackwardPlan& plan, std::int64_t row, const BackwardArrays& arrays,
                 const BackwardScratch& scratch) {
  const FloatTag d;
  const adaattn_backward_args& args = *plan.args;
  const std::int64_t nq = args.q.shape[2], i = row % nq, h = row / nq % args.q.shape[1], b = row / nq / args.q.shape[1];
  const FloatRows out = float_rows(rows_of(args.out, b, h, i), 1, plan.width_v, scratch.q_panels);
  const FloatRows dout = float_rows(rows_of(args.dout, b, h, i), 1, plan.width_v, scratch.dout_panels);
  FloatVector sum = hn::Zero(d);
  for (std::size_t at = 0; at < plan.width_v; at += kVectorLanes)
    sum = hn::MulAdd(hn::LoadU(d, out.data + at), hn::LoadU(d, dout.data + at), sum);
  arrays.delta[row] = hn::GetLane(hn::SumOfLanes(d, sum));
  arrays.reference[row] = args.lse[row] * kLog2E;
}

// dq of one row: the copies of all splits, summed in order, times the scale.
void finish_row(const BackwardPlan& plan, std::int64_t row, const BackwardArrays& arrays) {
  const FloatTag d;
  const adaattn_backward_args& args = *plan.args;
  const std::int64_t nq = args.q.shape[2], i = row % nq, h = row / nq % args.q.shape[1], b = row / nq / args.q.shape[1];
  float* total = arrays.dq + row * static_cast<std::int64_t>(plan.width);
  for (std::int64_t split = 1; split < plan.splits; ++split) {
    const float* part = total + split * plan.rows * static_cast<std::int64_t>(plan.width);
    for (std::size_t at = 0; at < plan.width; at += kVectorLanes)
      hn::StoreU(hn::Add(hn::LoadU(d, total + at), hn::LoadU(d, part + at)), d, total + at);
  }
  store_rows(total, plan.width, &plan.scale, 1, rows_of(args.dq, b, h, i));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(prepare_row);
HWY_EXPORT(backward_task);
HWY_EXPORT(finish_row);

void prepare_gradient_row(const BackwardPlan& plan, std::int64_t row, const BackwardArrays& arrays,
                          const BackwardScratch& scratch) {
  HWY_DYNAMIC_DISPATCH(prepare_row)(plan, row, arrays, scratch);
}

void finish_gradient_row(const BackwardPlan& plan, std::int64_t row, const BackwardArrays& arrays) {
  HWY_DYNAMIC_DISPATCH(finish_row)(plan, row, arrays);
}

std::size_t backward_workspace(const adaattn_backward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const BackwardPlan plan = make_backward_plan(args, threads);
  Scratch scratch(nullptr);
  lay_out_shared(plan, scratch);
  for (int thread = 0; thread < threads; ++thread) lay_out_thread(plan, scratch);
  return scratch.bytes();
}

void backward(const adaattn_backward_args& args) {
  const int threads = thread_count(args.options.num_threads);
  const BackwardPlan plan = make_backward_plan(args, threads);
#pragma omp parallel num_threads(threads_for(args.q, args.k, args.v, threads))
  {
    Scratch scratch(args.workspace);
    const BackwardArrays arrays = lay_out_shared(plan, scratch);
    BackwardScratch mine{};
    for (int thread = 0; thread <= omp_get_thread_num(); ++thread) mine = lay_out_thread(plan, scratch);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.rows; ++row) prepare_gradient_row(plan, row, arrays, mine);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < plan.tasks; ++task)
      HWY_DYNAMIC_DISPATCH(backward_task)(plan, task, arrays, mine);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < plan.rows; ++row) finish_gradient_row(plan, row, arrays);
  }
}

}  // namespace adaattn::cpu
#endif
