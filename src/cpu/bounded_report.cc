#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/bounded_engine.h"
#include "cpu/tiled.h"

namespace adaattn::cpu::bounds {
namespace {

// Tiles of a dense head are high as far as some query of the panel sees them.
void fill_dense_classes(const Engine& engine, std::int64_t head) {
  const adaattn_forward_args& args = *engine.args;
  const Visibility visibility =
      make_visibility(args.options, args.q.shape[2],
                      args.key_lengths != nullptr ? args.key_lengths[head / args.q.shape[1]] : args.k.shape[2]);
  const auto panel = static_cast<std::int64_t>(panel_rows()), panels = (args.q.shape[2] + panel - 1) / panel;
  const auto tiles = static_cast<std::int64_t>(bound_tiles(args));
  std::uint8_t* classes = args.tile_classes + head * panels * tiles;
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t last = std::min((p + 1) * panel, args.q.shape[2]) - 1;
    const std::int64_t seen = (visible_keys(visibility, p * panel, last).end + kBoundTile - 1) / kBoundTile;
    std::fill_n(classes + p * tiles, seen, ADAATTN_TILE_HIGH);
    std::fill_n(classes + p * tiles + seen, tiles - seen, ADAATTN_TILE_HIDDEN);
  }
}

double mean_of(const float* rows, std::int64_t count) {
  return rows != nullptr ? std::accumulate(rows, rows + count, 0.0) / static_cast<double>(count)
                         : std::numeric_limits<double>::quiet_NaN();
}

// Dense heads may have been tiled before.
void clear_masses(const Engine& engine, std::int64_t head) {
  const adaattn_forward_args one = head_problem(*engine.args, head);
  for (float* masses : {one.summarised_mass, one.omitted_mass})
    if (masses != nullptr) std::fill_n(masses, one.q.shape[2], 0.0F);
}

void report_heads(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  for (std::int64_t h = 0; h < engine.heads; ++h) {
    const HeadState& state = engine.states[h];
    adaattn_head_report& report = args.heads[h];
    report = {};
    report.plan = {.form = state.form,
                   .precision = ADAATTN_PRECISION_FLOAT32,
                   .low_precision = ADAATTN_PRECISION_FLOAT32,
                   .pooled = 0,
                   .rank = 0,
                   .screen = -std::numeric_limits<float>::infinity(),
                   .low = -std::numeric_limits<float>::infinity(),
                   .drop = 0};
    const adaattn_forward_args one = head_problem(args, h);
    const bool asked = asks_for_masses(args), tiled = state.form == ADAATTN_TILED;
    report.summarised_mass = mean_of(one.summarised_mass, args.q.shape[2]);
    report.omitted_mass = mean_of(one.omitted_mass, args.q.shape[2]);
    report.accounted_error = asked && !tiled ? 0 : std::numeric_limits<double>::quiet_NaN();
    report.escalations = state.escalations;
    report.error_bound = state.bound;
    report.work = state.work;
    if (!tiled) {
      report.work += 1;  // in float32; FP64, if it came to that, is counted already
      continue;
    }
    report.work += tile_work(args, state.total);
    report.tiles = state.total.tiles;
    report.summarised_tiles = state.total.summarised;
    report.high_tiles = state.total.tiles - state.total.summarised;
  }
}

}  // namespace

void report(const Engine& engine) {
  const adaattn_forward_args& args = *engine.args;
  for (std::int64_t h = 0; h < engine.heads; ++h) {
    if (engine.states[h].form != ADAATTN_DENSE) continue;
    if (args.tile_classes != nullptr) fill_dense_classes(engine, h);
    clear_masses(engine, h);
  }
  if (args.heads != nullptr) report_heads(engine);
}

}  // namespace adaattn::cpu::bounds
