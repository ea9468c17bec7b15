// Attention problems with classes of tiles, and the backward pass over them, for tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <vector>

#include "adaattn/attention.h"
#include "buffer.h"
#include "common/visibility.h"

namespace adaattn::testing {

struct Shape {
  const char* name = "";
  std::int64_t query_heads = 2, key_heads = 2, queries = 150, keys = 200, dim = 24, value_dim = 40;
  bool causal = true;
  std::int64_t key_length = -1;
};
inline void PrintTo(const Shape& shape, std::ostream* stream) { *stream << shape.name; }

using Values = std::vector<double>;

struct Inputs {
  explicit Inputs(const Shape& s) {
    Random random(23);
    const auto fill = [&](std::int64_t count) {
      std::vector<float> values(static_cast<std::size_t>(count));
      for (float& x : values) x = random.normal();
      return values;
    };
    q = fill(s.query_heads * s.queries * s.dim);
    k = fill(s.key_heads * s.keys * s.dim);
    v = fill(s.key_heads * s.keys * s.value_dim);
    dout = fill(s.query_heads * s.queries * s.value_dim);
  }
  std::vector<float> q, k, v, dout;
};

inline adaattn_options options_of(const Shape& s) {
  adaattn_options options = adaattn_default_options();
  options.causal = s.causal ? 1 : 0;
  options.alignment = ADAATTN_BOTTOM_RIGHT;
  return options;
}

inline Visibility visibility_of(const Shape& s) {
  return make_visibility(options_of(s), s.queries, s.key_length < 0 ? s.keys : s.key_length);
}

// Classes as a forward pass could have them: panels that see only part of a tile have it high or low.
inline std::vector<std::uint8_t> random_classes(const Shape& s, std::int64_t panel) {
  Random random(29);
  const Visibility visibility = visibility_of(s);
  std::vector<std::uint8_t> classes;
  for (std::int64_t h = 0; h < s.query_heads; ++h)
    for (std::int64_t first = 0; first < s.queries; first += panel)
      for (std::int64_t tile = 0; tile < s.keys; tile += 64) {
        const std::int64_t last = std::min(first + panel, s.queries) - 1;
        const std::int64_t end = std::min(tile + 64, visibility.key_count);
        auto c = static_cast<std::uint8_t>(1 + 6 * random.uniform());
        if (c == ADAATTN_TILE_POOLED && end - tile < 64) c = ADAATTN_TILE_DROPPED;
        if (tile == 0 || visible_keys(visibility, first, first).end < end)
          c = static_cast<std::uint8_t>(c % 2 == 0 ? ADAATTN_TILE_HIGH : ADAATTN_TILE_LOW);
        if (visible_keys(visibility, last, last).end <= tile) c = ADAATTN_TILE_HIDDEN;
        classes.push_back(c);
      }
  return classes;
}

struct Gradients {
  std::vector<float> q, k, v;
};

inline Gradients run(const Shape& s, Inputs& inputs, const Values& out, const Values& lse,
                     const std::vector<std::uint8_t>& classes, const std::vector<adaattn_head_plan>& plans,
                     int threads) {
  Gradients got = {.q = std::vector<float>(inputs.q.size(), NAN),
                   .k = std::vector<float>(inputs.k.size(), NAN),
                   .v = std::vector<float>(inputs.v.size(), NAN)};
  std::vector<float> out32(out.begin(), out.end()), lse32(lse.begin(), lse.end());
  const auto view = [](std::vector<float>& x, std::int64_t heads, std::int64_t tokens, std::int64_t dim) {
    return adaattn::view(x.data(), {1, heads, tokens, dim});
  };
  BackwardArgs args{};
  args.q = view(inputs.q, s.query_heads, s.queries, s.dim);
  args.k = view(inputs.k, s.key_heads, s.keys, s.dim);
  args.v = view(inputs.v, s.key_heads, s.keys, s.value_dim);
  args.out = view(out32, s.query_heads, s.queries, s.value_dim);
  args.dout = view(inputs.dout, s.query_heads, s.queries, s.value_dim);
  args.dq = view(got.q, s.query_heads, s.queries, s.dim);
  args.dk = view(got.k, s.key_heads, s.keys, s.dim);
  args.dv = view(got.v, s.key_heads, s.keys, s.value_dim);
  args.lse = lse32.data();
  args.options = options_of(s);
  args.options.num_threads = threads;
  args.key_lengths = s.key_length < 0 ? nullptr : &s.key_length;
  args.plans = plans.data();
  args.tile_classes = classes.data();
  adaattn::backward(args);
  return got;
}

inline Values wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

}  // namespace adaattn::testing
