#include "cpu/bounded_block.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/bounded_block.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/online_softmax-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/panel_mask.h"
#include "cpu/rows.h"
#include "cpu/simd/micro_gemm-inl.h"
#include "cpu/simd/rows-inl.h"
#include "plan/error_bound.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr auto kTileKeys = static_cast<std::size_t>(kBoundTile);

struct Block {
  const ForwardPlan* plan;
  const ForwardScratch* scratch;
  const BoundedScratch* bounded;
  const ValueTiles* values;
  Visibility visibility;
  PanelRows rows;
  std::size_t panels;
  std::size_t tiles;  // up to the last that the block sees
  std::int64_t key_end;

  Panel panel(std::size_t index) const { return panel_at(*plan, *scratch, rows, index); }
  float* scores(std::size_t index, std::size_t tile) const {
    return bounded->scores + (index * tiles + tile) * kTileKeys * kPanelLanes;
  }
  std::uint8_t* classes(std::size_t index) const { return bounded->classes + index * tiles; }
  float* masses(std::size_t index, std::size_t tile) const {
    return bounded->masses + (index * tiles + tile) * kPanelLanes;
  }
  float* strays(std::size_t index, std::size_t tile) const {
    return bounded->strays + (index * tiles + tile) * kPanelLanes;
  }
  TileView view(const Panel& panel, std::size_t tile) const {
    const std::int64_t begin = static_cast<std::int64_t>(tile) * kBoundTile;
    return view_tile(visibility, panel.rows, begin, std::min(begin + kBoundTile, key_end));
  }
  std::size_t keys_of(std::size_t tile) const {
    const std::int64_t begin = static_cast<std::int64_t>(tile) * kBoundTile;
    return static_cast<std::size_t>(std::min(begin + kBoundTile, key_end) - begin);
  }
};

PanelRows block_rows(const ForwardPlan& plan, std::int64_t task) {
  const std::int64_t first = (plan.blocks - 1 - task) * plan.block;  // long blocks first
  return {.b = 0,
          .first_head = 0,
          .nq = plan.args->q.shape[2],
          .first = first,
          .count = std::min(plan.block, plan.rows - first)};
}

Block begin_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& values, const ForwardScratch& scratch,
                  const BoundedScratch& bounded) {
  const PanelRows rows = block_rows(plan, task);
  const Visibility visibility = visibility_of(plan, 0);
  const std::int64_t end = visible_keys(visibility, rows.first_query(), rows.last_query()).end;
  return {.plan = &plan,
          .scratch = &scratch,
          .bounded = &bounded,
          .values = &values,
          .visibility = visibility,
          .rows = rows,
          .panels = (static_cast<std::size_t>(rows.count) + kPanelLanes - 1) / kPanelLanes,
          .tiles = static_cast<std::size_t>((end + kBoundTile - 1) / kBoundTile),
          .key_end = end};
}

// Scores of every key that the block sees. A tile that a panel sees is high for now.
HWY_NOINLINE void score_block(const Block& block) {
  const FloatTag d;
  const adaattn_tensor& keys = block.plan->args->k;
  const auto dim = static_cast<std::size_t>(keys.shape[3]);
  for (std::size_t p = 0; p < block.panels; ++p) begin_panel(*block.plan, *block.scratch, block.panel(p));
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    const std::int64_t first = static_cast<std::int64_t>(tile) * kBoundTile;
    const FloatRows k = float_rows(rows_of(keys, 0, 0, first), block.keys_of(tile), dim, block.scratch->k_tile);
    for (std::size_t p = 0; p < block.panels; ++p) {
      const Panel panel = block.panel(p);
      const TileView view = block.view(panel, tile);
      block.classes(p)[tile] = view.begin < view.end ? ADAATTN_TILE_HIGH : ADAATTN_TILE_HIDDEN;
      if (view.begin >= view.end) continue;
      const auto offset = static_cast<std::size_t>(view.begin - first);
      const auto count = static_cast<std::size_t>(view.end - view.begin);
      float* scores = block.scores(p, tile) + offset * kPanelLanes;
      Pair top = {hn::Set(d, kNegativeInfinity), hn::Set(d, kNegativeInfinity)};
      StoreScores store_scores{scores, &top};
      panel_gemm<ALayout::kRowMajor>(count, k.data + offset * k.ld, k.ld, panel.q, kPanelLanes, dim, store_scores);
      if (!view.all_visible) {
        const LaneBounds<kPanelLanes> bounds(block.visibility, panel.rows, first);
        top = mask_scores(scores, count, static_cast<std::int32_t>(offset), bounds, nullptr);
      }
      const Pair old = load_pair(panel.state.top);
      store_pair({hn::Max(old.low, top.low), hn::Max(old.high, top.high)}, panel.state.top);
    }
  }
}

// Scores to exponentials, in place; receives their sums and sums of squares.
template <bool kMasked>
HWY_INLINE void weigh_tile(float* scores, std::size_t keys, const RowState& state, bool moment, Pair& mass,
                           Pair& squares) {
  const FloatTag d;
  const FloatVector log2e = hn::Set(d, kLog2E), hidden = hn::Set(d, kNegativeInfinity), zero = hn::Zero(d);
  const Pair reference = load_pair(state.reference);
  Pair sums[2] = {{zero, zero}, {zero, zero}}, moments = load_pair(state.moment);
  squares = {zero, zero};
  const auto one = [&](float* at, FloatVector ref, FloatVector& sum, FloatVector& square,
                       FloatVector& weighted) HWY_ATTR {
    const FloatVector score = hn::LoadU(d, at);
    const FloatVector x = hn::MulSub(score, log2e, ref);
    FloatVector p = exp2_near_zero(x);
    if constexpr (kMasked) p = hn::IfThenZeroElse(hn::Eq(score, hidden), p);
    hn::StoreU(p, d, at);
    sum = hn::Add(sum, p);
    square = hn::MulAdd(p, p, square);
    if (moment) weighted = hn::Add(weighted, hn::IfThenZeroElse(hn::Eq(p, zero), hn::Mul(p, x)));  // not 0 * -inf
  };
  for (std::size_t key = 0; key < keys; ++key) {
    float* at = scores + key * kPanelLanes;
    one(at, reference.low, sums[key % 2].low, squares.low, moments.low);
    one(at + kVectorLanes, reference.high, sums[key % 2].high, squares.high, moments.high);
  }
  if (moment) store_pair(moments, state.moment);
  mass = {hn::Add(sums[0].low, sums[1].low), hn::Add(sums[0].high, sums[1].high)};
}

// Exponentials of one panel, their sum per row, and what each tile would add to the rows' errors if it were summarised.
HWY_NOINLINE void weigh_panel(const Block& block, std::size_t index, const Panel& panel) {
  const FloatTag d;
  const RowState& state = panel.state;
  for (std::size_t lane = 0; lane < kPanelLanes; ++lane)  // rows that see nothing keep the lowest reference
    if (state.top[lane] != kNegativeInfinity) state.reference[lane] = state.top[lane] * kLog2E;
  const AddCompensated add_sum{state.sum, state.compensation};
  const bool moment = block.plan->args->entropy != nullptr;
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    if (block.classes(index)[tile] == ADAATTN_TILE_HIDDEN) continue;
    const TileView view = block.view(panel, tile);
    const auto keys = static_cast<std::size_t>(view.end - view.begin);
    float* scores = block.scores(index, tile) + static_cast<std::size_t>(view.begin % kBoundTile) * kPanelLanes;
    Pair mass, squares;
    if (view.all_visible)
      weigh_tile<false>(scores, keys, state, moment, mass, squares);
    else
      weigh_tile<true>(scores, keys, state, moment, mass, squares);
    add_sum.add(0, mass.low);
    add_sum.add(kVectorLanes, mass.high);
    store_pair(mass, block.masses(index, tile));
    // ||p - m / n||^2; the two sums of 64 terms are off by up to 8e-6 of the first one.
    const FloatVector share = hn::Set(d, -1.0F / static_cast<float>(keys)), slack = hn::Set(d, 1e-5F);
    const FloatVector spread = hn::Set(d, block.values->spreads[tile]);
    const auto stray = [&](FloatVector m, FloatVector square) HWY_ATTR {
      const FloatVector rest = hn::MulAdd(hn::Mul(m, m), share, square);
      return hn::Mul(spread, hn::Sqrt(hn::MulAdd(slack, square, hn::Max(rest, hn::Zero(d)))));
    };
    store_pair({stray(mass.low, squares.low), stray(mass.high, squares.high)}, block.strays(index, tile));
  }
}

struct RowFactors {
  float inverse[kPanelLanes];  // 1 / sum of exponentials; 0 for rows that do not exist
};
HWY_INLINE RowFactors row_factors(const Panel& panel) {
  RowFactors factors{};
  for (std::size_t lane = 0; lane < static_cast<std::size_t>(panel.rows.count); ++lane)
    factors.inverse[lane] = panel.state.sum[lane] > 0 ? 1 / panel.state.sum[lane] : 0.0F;
  return factors;
}

// Marks the tiles to summarise, those that add least first, while the squared bound of the panel's error stays below
// allowed. row_errors [lanes] receives the rows' bounds; returns the number of tiles.
HWY_NOINLINE std::int64_t choose_tiles(const Block& block, std::size_t index, const Panel& panel, double allowed,
                                       float* row_errors) {
  const FloatTag d;
  const RowFactors factors = row_factors(panel);
  const Pair inverse = load_pair(factors.inverse);
  double* squares = block.bounded->squares;
  std::int32_t* order = block.bounded->order;
  std::uint8_t* classes = block.classes(index);
  const auto part = [&](std::size_t tile) HWY_ATTR {
    const Pair stray = load_pair(block.strays(index, tile));
    return Pair{hn::Mul(stray.low, inverse.low), hn::Mul(stray.high, inverse.high)};
  };
  const auto sum_squares = [&](Pair errors) HWY_ATTR {
    const FloatVector both = hn::MulAdd(errors.low, errors.low, hn::Mul(errors.high, errors.high));
    return static_cast<double>(hn::GetLane(hn::SumOfLanes(d, both)));
  };
  std::size_t count = 0;
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    // What a row with hidden keys does not see must not reach it through the mean.
    if (classes[tile] == ADAATTN_TILE_HIDDEN || !block.view(panel, tile).all_visible) continue;
    squares[tile] = sum_squares(part(tile));
    if (squares[tile] <= allowed) order[count++] = static_cast<std::int32_t>(tile);  // NaN stays out
  }
  std::sort(order, order + count,
            [&](std::int32_t a, std::int32_t b) { return squares[a] != squares[b] ? squares[a] < squares[b] : a < b; });
  Pair errors = {hn::Zero(d), hn::Zero(d)};
  std::int64_t chosen = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Pair more = part(static_cast<std::size_t>(order[i]));
    const Pair next = {hn::Add(errors.low, more.low), hn::Add(errors.high, more.high)};
    if (!(sum_squares(next) <= allowed)) break;
    errors = next;
    classes[order[i]] = ADAATTN_TILE_SUMMARISED;
    ++chosen;
  }
  store_pair(errors, row_errors);
  return chosen;
}

// out += exponentials times v over the high tiles.
HWY_NOINLINE void add_high_tiles(const Block& block) {
  const adaattn_tensor& values = block.plan->args->v;
  const auto dv = static_cast<std::size_t>(values.shape[3]);
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    bool wanted = false;
    for (std::size_t p = 0; p < block.panels; ++p) wanted = wanted || block.classes(p)[tile] == ADAATTN_TILE_HIGH;
    if (!wanted) continue;
    const std::int64_t first = static_cast<std::int64_t>(tile) * kBoundTile;
    const FloatRows v = float_rows(rows_of(values, 0, 0, first), block.keys_of(tile), dv, block.scratch->v_tile);
    for (std::size_t p = 0; p < block.panels; ++p) {
      if (block.classes(p)[tile] != ADAATTN_TILE_HIGH) continue;
      const Panel panel = block.panel(p);
      const TileView view = block.view(panel, tile);
      const auto offset = static_cast<std::size_t>(view.begin - first);
      AddCompensated add{panel.out, panel.compensation};
      panel_gemm<ALayout::kTransposed>(dv, v.data + offset * v.ld, v.ld, block.scores(p, tile) + offset * kPanelLanes,
                                       kPanelLanes, static_cast<std::size_t>(view.end - view.begin), add);
    }
  }
}

// out += mass times mean v over the summarised tiles. masses are those of the panel.
HWY_NOINLINE void add_summaries(const Block& block, std::size_t index, const Panel& panel) {
  const auto dv = static_cast<std::size_t>(block.plan->args->v.shape[3]),
             width = padded_width(block.plan->args->v.shape[3]);
  std::size_t count = 0;
  const auto flush = [&]() HWY_ATTR {
    AddCompensated add{panel.out, panel.compensation};
    panel_gemm<ALayout::kTransposed>(dv, block.bounded->values, width, block.bounded->listed, kPanelLanes, count, add);
    count = 0;
  };
  for (std::size_t tile = 0; tile < block.tiles; ++tile) {
    if (block.classes(index)[tile] != ADAATTN_TILE_SUMMARISED) continue;
    std::copy_n(block.values->means + tile * width, width, block.bounded->values + count * width);
    store_pair(load_pair(block.masses(index, tile)), block.bounded->listed + count * kPanelLanes);
    if (++count == kKeyTile) flush();
  }
  if (count > 0) flush();
}

// Shares of the rows' sums that summarised tiles have; nothing is omitted.
void write_masses(const Block& block, std::size_t index, const Panel& panel) {
  const adaattn_forward_args& args = *block.plan->args;
  const auto rows = static_cast<std::size_t>(panel.rows.count);
  if (args.omitted_mass != nullptr) std::fill_n(args.omitted_mass + panel.rows.first, rows, 0.0F);
  if (args.summarised_mass == nullptr) return;
  const RowFactors factors = row_factors(panel);
  for (std::size_t lane = 0; lane < rows; ++lane) {
    double sum = 0;
    for (std::size_t tile = 0; tile < block.tiles; ++tile)
      if (block.classes(index)[tile] == ADAATTN_TILE_SUMMARISED) sum += block.masses(index, tile)[lane];
    args.summarised_mass[panel.rows.first + static_cast<std::int64_t>(lane)] =
        static_cast<float>(sum * factors.inverse[lane]);
  }
}

double row_rounding(const adaattn_forward_args& args, const KeySizes& sizes, double query_size, double largest) {
  return rounding_bound(query_size * sizes.key, 1 - largest, sizes.value, static_cast<double>(args.q.shape[3]),
                        static_cast<double>(kKeyTile), kFloat32Unit);
}

// Bound and norm of the panel's rows once their sums are complete.
HWY_NOINLINE BlockBound bound_panel(const Block& block, const Panel& panel, const float* row_errors) {
  const FloatTag d;
  const adaattn_forward_args& args = *block.plan->args;
  const auto norms = [&](const float* columns, std::int64_t count, float* out) HWY_ATTR {
    Pair sums = {hn::Zero(d), hn::Zero(d)};
    for (std::int64_t c = 0; c < count; ++c) {
      const Pair value = load_pair(columns + static_cast<std::size_t>(c) * kPanelLanes);
      sums = {hn::MulAdd(value.low, value.low, sums.low), hn::MulAdd(value.high, value.high, sums.high)};
    }
    store_pair({hn::Sqrt(sums.low), hn::Sqrt(sums.high)}, out);
  };
  float query[kPanelLanes], out[kPanelLanes];
  norms(panel.q, args.q.shape[3], query);
  norms(panel.out, args.v.shape[3], out);
  const RowFactors factors = row_factors(panel);
  BlockBound bound;
  for (std::size_t lane = 0; lane < static_cast<std::size_t>(panel.rows.count); ++lane) {
    // The largest exponential is 2^(top * log2(e) - reference), 1 to within rounding. Norms and bounds are sums of at
    // most 256 squares in float32, good to 1e-4.
    const double error =
        1.0001 * row_errors[lane] + row_rounding(args, *block.values->sizes, query[lane], factors.inverse[lane]);
    const double norm = 0.9999 * out[lane] * factors.inverse[lane];
    if (panel.state.sum[lane] == 0) continue;  // sees nothing: 0, exactly
    bound.error += error * error;
    bound.norm += norm * norm;
  }
  return bound;
}

void weigh_and_add(const Block& block, double allowed, std::uint8_t* classes, BlockBound& total) {
  float row_errors[kMaxBlock];
  for (std::size_t p = 0; p < block.panels; ++p) {
    const Panel panel = block.panel(p);
    weigh_panel(block, p, panel);
    std::int64_t seen = 0;
    for (std::size_t tile = 0; tile < block.tiles; ++tile)
      seen += static_cast<std::int64_t>(block.classes(p)[tile] != ADAATTN_TILE_HIDDEN);
    total.tiles += seen;
    total.summarised +=
        choose_tiles(block, p, panel, allowed * static_cast<double>(seen), row_errors + p * kPanelLanes);
    add_summaries(block, p, panel);
    write_masses(block, p, panel);
    if (classes == nullptr) continue;
    std::uint8_t* to =
        classes + static_cast<std::size_t>(panel.rows.first) / kPanelLanes * bound_tiles(*block.plan->args);
    std::copy_n(block.classes(p), block.tiles, to);
    std::fill(to + block.tiles, to + bound_tiles(*block.plan->args), ADAATTN_TILE_HIDDEN);
  }
  add_high_tiles(block);
  for (std::size_t p = 0; p < block.panels; ++p) {
    const Panel panel = block.panel(p);
    const BlockBound bound = bound_panel(block, panel, row_errors + p * kPanelLanes);
    total.error += bound.error;
    total.norm += bound.norm;
  }
}

}  // namespace

BlockBound bounded_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& values, double allowed,
                         const ForwardScratch& scratch, const BoundedScratch& bounded, std::uint8_t* classes) {
  const Block block = begin_block(plan, task, values, scratch, bounded);
  score_block(block);
  BlockBound total;
  weigh_and_add(block, allowed, classes, total);
  for (std::size_t p = 0; p < block.panels; ++p) finish_panel(plan, scratch, block.panel(p));
  return total;
}

BlockBound try_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& values, double relative_error,
                     const ForwardScratch& scratch, const BoundedScratch& bounded) {
  const Block block = begin_block(plan, task, values, scratch, bounded);
  score_block(block);
  BlockBound total;
  for (std::size_t p = 0; p < block.panels; ++p) weigh_panel(block, p, block.panel(p));
  add_high_tiles(block);
  for (std::size_t p = 0; p < block.panels; ++p) {
    const Panel panel = block.panel(p);
    float row_errors[kPanelLanes] = {};
    const BlockBound bound = bound_panel(block, panel, row_errors);
    for (std::size_t tile = 0; tile < block.tiles; ++tile)
      total.tiles += static_cast<std::int64_t>(block.classes(p)[tile] != ADAATTN_TILE_HIDDEN);
    total.norm += bound.norm;
    total.summarised += choose_tiles(block, p, panel, relative_error * relative_error * bound.norm, row_errors);
  }
  return total;
}

BlockBound dense_block(const ForwardPlan& plan, std::int64_t task, const KeySizes& sizes,
                       const ForwardScratch& scratch) {
  const FloatTag d;
  const adaattn_forward_args& args = *plan.args;
  const PanelRows rows = block_rows(plan, task);
  const auto norm_of = [&](const adaattn_tensor& tensor, std::int64_t row) HWY_ATTR {
    const std::size_t width = padded_width(tensor.shape[3]);
    const FloatRows values = float_rows(rows_of(tensor, 0, 0, row), 1, width, scratch.v_tile);
    FloatVector sum = hn::Zero(d);
    for (std::size_t at = 0; at < width; at += kVectorLanes) {
      const FloatVector value = hn::LoadU(d, values.data + at);
      sum = hn::MulAdd(value, value, sum);
    }
    return std::sqrt(static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum))));
  };
  // 16-bit outputs have been rounded: by up to 2^-9 of an element, or 2^-25 where float16 is subnormal.
  const double kept = args.out.dtype == ADAATTN_FLOAT32 ? 0.9999 : 1 - 0x1p-8;
  const double lost = args.out.dtype == ADAATTN_FLOAT16 ? 0x1p-25 * std::sqrt(static_cast<double>(args.v.shape[3])) : 0;
  BlockBound bound;
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row) {
    if (args.max_probability[row] == 0) continue;  // sees nothing: 0, exactly
    const double error =
        row_rounding(args, sizes, norm_of(args.q, row) * std::fabs(plan.scale) * 1.0001, args.max_probability[row]);
    const double norm = std::fmax(0, kept * norm_of(args.out, row) - lost);
    bound.error += error * error;
    bound.norm += norm * norm;
  }
  return bound;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(bounded_block);
HWY_EXPORT(try_block);
HWY_EXPORT(dense_block);

BlockBound run_bounded_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& tiles, double allowed,
                             const ForwardScratch& scratch, const BoundedScratch& bounded, std::uint8_t* classes) {
  return HWY_DYNAMIC_DISPATCH(bounded_block)(plan, task, tiles, allowed, scratch, bounded, classes);
}

BlockBound try_bounded_block(const ForwardPlan& plan, std::int64_t task, const ValueTiles& tiles, double relative_error,
                             const ForwardScratch& scratch, const BoundedScratch& bounded) {
  return HWY_DYNAMIC_DISPATCH(try_block)(plan, task, tiles, relative_error, scratch, bounded);
}

BlockBound bound_dense_block(const ForwardPlan& plan, std::int64_t task, const KeySizes& sizes,
                             const ForwardScratch& scratch) {
  return HWY_DYNAMIC_DISPATCH(dense_block)(plan, task, sizes, scratch);
}

}  // namespace adaattn::cpu
#endif
