#include "measure/measure.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/visibility.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "measure/moments.h"
#include "measure/sampled_rows.h"

namespace adaattn::measure {
namespace {

constexpr std::uint32_t kNeedRows =
    ADAATTN_STATISTIC_ROWS | ADAATTN_STATISTIC_OUTPUT | ADAATTN_STATISTIC_SOFTMAX_SPECTRUM;

struct Layout {
  Moments *k, *v;  // [B * Hk]
  Sample sample;
  MomentsScratch* moments;  // [threads]
  SampleScratch* samples;   // [threads]
  int threads;
};

bool asked(const adaattn_measure_args& args, std::uint32_t statistic) { return (args.statistics & statistic) != 0; }

Layout lay_out(const adaattn_measure_args& args, Scratch& scratch) {
  Layout layout{};
  layout.threads = cpu::thread_count(args.options.num_threads);
  const auto key_heads = static_cast<std::size_t>(args.q.shape[0] * args.k.shape[1]);
  const auto threads = static_cast<std::size_t>(layout.threads);
  layout.k = scratch.take<Moments>(key_heads);
  layout.v = scratch.take<Moments>(key_heads);
  if (asked(args, kNeedRows)) layout.sample = lay_out_sample(args, scratch);
  layout.moments = scratch.take<MomentsScratch>(threads);
  layout.samples = scratch.take<SampleScratch>(threads);
  for (std::size_t t = 0; t < threads; ++t) {
    const MomentsScratch moments = lay_out_moments(std::max(args.q.shape[3], args.v.shape[3]), scratch);
    SampleScratch sample{};
    if (asked(args, kNeedRows)) sample = lay_out_sample_thread(args, layout.sample, scratch);
    if (layout.moments == nullptr) continue;
    layout.moments[t] = moments;
    layout.samples[t] = sample;
  }
  return layout;
}

std::int64_t key_count(const adaattn_measure_args& args, std::int64_t b) {
  return args.key_lengths != nullptr ? args.key_lengths[b] : args.k.shape[2];
}

// Of dense attention on one head; a v that is not there counts as one of D.
double dense_work(const adaattn_measure_args& args, std::int64_t b) {
  const Visibility visibility = make_visibility(args.options, args.q.shape[2], key_count(args, b));
  double pairs = 0;
  for (std::int64_t i = 0; i < args.q.shape[2]; ++i) {
    const KeyRange range = visible_keys(visibility, i, i);
    pairs += static_cast<double>(range.sink_end + range.end - range.begin);
  }
  return pairs * static_cast<double>(args.q.shape[3] + args.v.shape[3]);
}

adaattn_head_statistics nothing() {
  constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
  adaattn_head_statistics s{};
  for (double* field : {&s.largest_q, &s.largest_k, &s.largest_v, &s.crest_q, &s.crest_k, &s.crest_v, &s.outliers_q,
                        &s.outliers_k, &s.outliers_v, &s.key_mean, &s.entropy, &s.output_norm, &s.max_probability,
                        &s.score_deviation, &s.score_range, &s.softmax_energy, &s.softmax_residual})
    *field = kNothing;
  return s;
}

// Divides by the work of dense attention; 0 where there is none of it.
double share(double work, double dense) { return dense > 0 ? work / dense : 0; }

void measure_key_head(const adaattn_measure_args& args, std::int64_t at, const Layout& layout,
                      const MomentsScratch& scratch) {
  const std::int64_t b = at / args.k.shape[1], h = at % args.k.shape[1], count = key_count(args, b);
  const auto dim = static_cast<std::size_t>(args.k.shape[3]);
  if (asked(args, ADAATTN_STATISTIC_RANGE)) {
    layout.k[at] = moments(cpu::rows_of(args.k, b, h, 0), count, scratch);
    layout.v[at] = moments(cpu::rows_of(args.v, b, h, 0), args.v.data != nullptr ? count : 0, scratch);
  }
  if (asked(args, ADAATTN_STATISTIC_SCORE_SPECTRUM))
    gram(cpu::rows_of(args.k, b, h, 0), count, /*centred=*/true, scratch,
         args.gram_k + static_cast<std::size_t>(at) * dim * dim);
}

void measure_head(const adaattn_measure_args& args, std::int64_t at, double dense, const Layout& layout,
                  const MomentsScratch& moments_scratch, const SampleScratch& sample_scratch) {
  const std::int64_t b = at / args.q.shape[1], h = at % args.q.shape[1], group = args.q.shape[1] / args.k.shape[1];
  const auto d = static_cast<double>(args.q.shape[3]), dv = static_cast<double>(args.v.shape[3]);
  const auto nq = static_cast<double>(args.q.shape[2]);
  const double nk = static_cast<double>(key_count(args, b)) / static_cast<double>(group);
  const auto dim = static_cast<std::size_t>(args.q.shape[3]);
  adaattn_head_statistics& s = args.heads[at] = nothing();
  if (asked(args, ADAATTN_STATISTIC_RANGE)) {
    const Moments q = moments(cpu::rows_of(args.q, b, h, 0), args.q.shape[2], moments_scratch);
    const std::int64_t key_head = b * args.k.shape[1] + h / group;
    const Moments &k = layout.k[key_head], &v = layout.v[key_head];
    s.largest_q = q.largest, s.largest_k = k.largest, s.largest_v = v.largest;
    s.crest_q = q.crest, s.crest_k = k.crest, s.crest_v = v.crest;
    s.outliers_q = q.outliers, s.outliers_k = k.outliers, s.outliers_v = v.outliers;
    s.key_mean = k.mean;
    s.work[0] = share(3 * (nq * d + nk * (d + (args.v.data != nullptr ? dv : 0))), dense);  // sum, square, compare
  }
  if (asked(args, ADAATTN_STATISTIC_SCORE_SPECTRUM)) {
    gram(cpu::rows_of(args.q, b, h, 0), args.q.shape[2], /*centred=*/false, moments_scratch,
         args.gram_q + static_cast<std::size_t>(at) * dim * dim);
    s.work[2] = share((nq + nk) * d * (d + 1) / 2 + nk * d, dense);
  }
  if (!asked(args, kNeedRows)) return;
  const std::size_t core = layout.sample.core();
  const SampleWork work = measure_rows(
      args, b, h, layout.sample, sample_scratch, s,
      args.softmax_core == nullptr ? nullptr : args.softmax_core + static_cast<std::size_t>(at) * core * core);
  s.work[1] = share(work.scores, dense);
  s.work[3] = share(work.output, dense);
  s.work[4] = share(work.spectrum, dense);
}

}  // namespace

std::size_t workspace_bytes(const adaattn_measure_args& args) {
  Scratch scratch(nullptr);
  lay_out(args, scratch);
  return scratch.bytes();
}

void run(const adaattn_measure_args& args) {
  if (args.q.shape[0] * args.q.shape[1] == 0) return;
  Scratch scratch(args.workspace);
  const Layout layout = lay_out(args, scratch);
  if (asked(args, kNeedRows)) draw_sample(args, layout.sample, layout.threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(layout.threads)
  for (std::int64_t at = 0; at < args.q.shape[0] * args.k.shape[1]; ++at)
    measure_key_head(args, at, layout, layout.moments[omp_get_thread_num()]);
#pragma omp parallel for schedule(dynamic, 1) num_threads(layout.threads)
  for (std::int64_t at = 0; at < args.q.shape[0] * args.q.shape[1]; ++at)
    measure_head(args, at, dense_work(args, at / args.q.shape[1]), layout, layout.moments[omp_get_thread_num()],
                 layout.samples[omp_get_thread_num()]);
}

}  // namespace adaattn::measure
