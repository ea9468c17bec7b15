// One panel of query rows on its way through the keys: its queries, sums and running softmax.
#if defined(ADAATTN_CPU_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_PANEL_INL_H_
#undef ADAATTN_CPU_PANEL_INL_H_
#else
#define ADAATTN_CPU_PANEL_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/forward_plan.h"
#include "cpu/online_softmax-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

struct Panel {
  PanelRows rows;
  const float* q;             // [D][kPanelLanes]
  float *out, *compensation;  // [Dv][kPanelLanes]
  RowState state;
};

HWY_INLINE Panel panel_at(const ForwardPlan& plan, const ForwardScratch& scratch, const PanelRows& block,
                          std::size_t index) {
  const auto d = static_cast<std::size_t>(plan.args->q.shape[3]), dv = static_cast<std::size_t>(plan.args->v.shape[3]);
  const auto first = static_cast<std::int64_t>(index * kPanelLanes);
  PanelRows rows = block;
  rows.first += first;
  rows.count = std::min(static_cast<std::int64_t>(kPanelLanes), block.count - first);
  return {.rows = rows,
          .q = scratch.q_panels + index * d * kPanelLanes,
          .out = scratch.out + index * dv * kPanelLanes,
          .compensation = scratch.compensation + index * dv * kPanelLanes,
          .state = RowState(scratch.state + index * RowState::kValues * kPanelLanes)};
}

// Calls visit(tensor_row_run, first_lane, count) for each run of the panel's rows that lies in one head of the tensor.
template <class Visit>
HWY_INLINE void for_each_run(const adaattn_tensor& tensor, const PanelRows& rows, Visit visit) {
  for (std::int64_t done = 0; done < rows.count;) {
    const std::int64_t row = rows.first + done;
    const std::int64_t count = std::min(rows.count - done, rows.nq - rows.query_of(row));
    visit(rows_of(tensor, rows.b, rows.head_of(row), rows.query_of(row)), static_cast<std::size_t>(done),
          static_cast<std::size_t>(count));
    done += count;
  }
}

HWY_INLINE void begin_panel(const ForwardPlan& plan, const ForwardScratch& scratch, const Panel& panel) {
  const auto d = static_cast<std::size_t>(plan.args->q.shape[3]), dv = static_cast<std::size_t>(plan.args->v.shape[3]);
  auto* q = const_cast<float*>(panel.q);
  std::fill_n(q, d * kPanelLanes, 0.0F);
  for_each_run(plan.args->q, panel.rows, [&](const Rows& rows, std::size_t lane, std::size_t count) HWY_ATTR {
    const FloatRows source = float_rows(rows, count, d, scratch.rows);
    transpose(source.data, source.ld, count, d, plan.scale, q + lane, kPanelLanes);
  });
  std::fill_n(panel.out, dv * kPanelLanes, 0.0F);
  std::fill_n(panel.compensation, dv * kPanelLanes, 0.0F);
  panel.state.clear();
}

// Sums so far are relative to 2^reference: moves them to the new references.
HWY_INLINE void rescale(const Panel& panel, std::size_t dv, Pair old_reference, Pair factor) {
  const FloatTag d;
  const RowState& state = panel.state;
  scale_rows(panel.out, dv, factor);
  scale_rows(panel.compensation, dv, factor);
  const Pair now = load_pair(state.reference), sum = load_pair(state.sum), moment = load_pair(state.moment);
  const auto moved = [&](FloatVector m, FloatVector s, FloatVector before, FloatVector after, FloatVector f) HWY_ATTR {
    const FloatVector shifted = hn::Mul(f, hn::MulAdd(hn::Sub(before, after), s, m));
    return hn::IfThenZeroElse(hn::Eq(s, hn::Zero(d)), shifted);
  };
  store_pair({moved(moment.low, sum.low, old_reference.low, now.low, factor.low),
              moved(moment.high, sum.high, old_reference.high, now.high, factor.high)},
             state.moment);
  scale_rows(state.sum, 1, factor);
  scale_rows(state.compensation, 1, factor);
}

// out = sums / sum of probabilities, LSE and the statistics of the panel's rows.
HWY_INLINE void finish_panel(const ForwardPlan& plan, const ForwardScratch& scratch, const Panel& panel) {
  const adaattn_forward_args& args = *plan.args;
  const auto dv = static_cast<std::size_t>(args.v.shape[3]);
  const RowState& state = panel.state;
  float inverse[kPanelLanes];
  for (std::size_t lane = 0; lane < static_cast<std::size_t>(panel.rows.count); ++lane) {
    // Products that came out as -inf without a mask: no key counts, but their clamped exponentials were summed.
    const bool nothing = state.top[lane] == kNegativeInfinity && !std::isnan(state.sum[lane]);
    const double sum = nothing ? 0 : state.sum[lane], log_sum = std::log(sum);
    constexpr double kLn2 = 0.69314718055994530942;
    inverse[lane] = sum == 0 ? 0.0F : static_cast<float>(1 / sum);
    const auto at = (panel.rows.b * args.q.shape[1] + panel.rows.first_head) * panel.rows.nq + panel.rows.first +
                    static_cast<std::int64_t>(lane);
    if (args.lse != nullptr) args.lse[at] = static_cast<float>(state.reference[lane] * kLn2 + log_sum);
    if (args.entropy != nullptr)
      args.entropy[at] = sum == 0 ? 0.0F : static_cast<float>(std::max(0.0, log_sum - kLn2 * state.moment[lane] / sum));
    if (args.max_probability != nullptr)
      args.max_probability[at] =
          sum == 0 ? 0.0F : static_cast<float>(std::exp(state.top[lane] - state.reference[lane] * kLn2) / sum);
  }
  transpose(panel.out, kPanelLanes, dv, kPanelLanes, 1.0F, scratch.rows, dv);
  for_each_run(args.out, panel.rows, [&](const Rows& rows, std::size_t lane, std::size_t count) HWY_ATTR {
    store_rows(scratch.rows + lane * dv, dv, inverse + lane, count, rows);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
