// Attention whose scores are rounded tile by tile, and its gradient straight through the rounding, in double: written
// from the definitions, with no code of the kernels. Roundings are done in float32, as anything else would break ties
// the other way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "adaattn/attention.h"
#include "tiled_gradient_problem.h"

namespace adaattn::testing {

inline float nearest(float x, int least_exponent, int mantissa_bits) {  // of a small floating-point format
  if (x == 0) return 0;
  const int exponent = std::max(std::ilogb(x), least_exponent);
  const float step = std::ldexp(1.0F, exponent - mantissa_bits);
  return std::nearbyint(x / step) * step;
}

// The values as a dot product in that precision takes them: one scale for all of them in 8 bits.
inline Values rounded(std::int32_t precision, const std::vector<float>& x) {
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  Values result;
  for (const float value : x) {
    float bfloat16 = value;
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x8000U) & 0xFFFF0000U;  // half way up
    std::memcpy(&bfloat16, &bits, sizeof bits);
    const float scale8 = largest / 127, scale_e4m3 = largest / 448;
    switch (precision) {
      case ADAATTN_PRECISION_FLOAT16: result.push_back(nearest(value, -14, 10)); break;
      case ADAATTN_PRECISION_BFLOAT16: result.push_back(bfloat16); break;
      case ADAATTN_PRECISION_INT8:
        result.push_back(static_cast<double>(std::nearbyint(value * (127 / largest))) * scale8);
        break;
      case ADAATTN_PRECISION_FLOAT8: result.push_back(nearest(value / scale_e4m3, -6, 3) * scale_e4m3); break;
      default: result.push_back(value);
    }
  }
  return result;
}

class RoundedAttention {
 public:
  RoundedAttention(const Shape& shape, const Inputs& inputs, std::int64_t panel,
                   const std::vector<std::uint8_t>& classes, const std::vector<adaattn_head_plan>& plans)
      : s_(shape), in_(inputs), panel_(panel), classes_(classes), plans_(plans), visibility_(visibility_of(shape)) {
    const auto size = [](std::int64_t count) { return Values(static_cast<std::size_t>(count)); };
    out = size(s_.query_heads * s_.queries * s_.value_dim);
    lse = size(s_.query_heads * s_.queries);
    dq = size(s_.query_heads * s_.queries * s_.dim);
    dk = size(s_.key_heads * s_.keys * s_.dim);
    dv = size(s_.key_heads * s_.keys * s_.value_dim);
    for (std::int64_t h = 0; h < s_.query_heads; ++h) run_head(h);
  }

  Values out, lse, dq, dk, dv;  // out: P v, nothing but the scores rounded

 private:
  // What one row attends to: a key or the mean of several, with the mean of some values.
  struct Term {
    double score;
    std::int64_t first_key, key_count, first_value, value_count;
  };

  std::vector<float> row(const std::vector<float>& x, std::int64_t at, std::int64_t width) const {
    return {x.begin() + at * width, x.begin() + (at + 1) * width};
  }

  // scores[i][j] with the whole head in that precision.
  std::vector<Values> scores(std::int64_t h, std::int64_t key_head, std::int32_t precision) const {
    const auto dim = static_cast<std::size_t>(s_.dim);
    const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s_.dim)));
    const bool centred = precision != ADAATTN_PRECISION_FLOAT32 && precision != ADAATTN_PRECISION_FLOAT16;
    std::vector<float> mean(dim);
    for (std::int64_t j = 0; j < visibility_.key_count && centred; ++j) {
      const std::vector<float> k = row(in_.k, key_head * s_.keys + j, s_.dim);
      for (std::size_t c = 0; c < dim; ++c) mean[c] += k[c];
    }
    for (float& x : mean) x /= static_cast<float>(visibility_.key_count);
    std::vector<Values> keys;
    for (std::int64_t j = 0; j < visibility_.key_count; ++j) {
      std::vector<float> k = row(in_.k, key_head * s_.keys + j, s_.dim);
      for (std::size_t c = 0; c < dim; ++c) k[c] -= mean[c];
      keys.push_back(rounded(precision, k));
    }
    std::vector<Values> result;
    for (std::int64_t i = 0; i < s_.queries; ++i) {
      std::vector<float> q = row(in_.q, h * s_.queries + i, s_.dim);
      for (float& x : q) x *= scale;
      const Values r = rounded(precision, q);
      double offset = 0;
      for (std::size_t c = 0; c < dim; ++c) offset += static_cast<double>(q[c]) * mean[c];
      Values& scores = result.emplace_back(keys.size(), offset);
      for (std::size_t j = 0; j < keys.size(); ++j)
        for (std::size_t c = 0; c < dim; ++c) scores[j] += r[c] * keys[j][c];
    }
    return result;
  }

  double mean_of(const std::vector<float>& x, std::int64_t row, std::int64_t width, std::int64_t c,
                 std::int64_t count) const {
    double sum = 0;
    for (std::int64_t j = row; j < row + count; ++j) sum += x[static_cast<std::size_t>(j * width + c)];
    return sum / static_cast<double>(count);
  }

  std::vector<Term> terms(std::int64_t h, std::int64_t key_head, std::int64_t i, const std::vector<Values>& high,
                          const std::vector<Values>& low) const {
    std::vector<Term> result;
    const auto at = static_cast<std::size_t>(i);
    const std::int64_t tiles = (s_.keys + 63) / 64, panels = (s_.queries + panel_ - 1) / panel_;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      std::uint8_t c = classes_[static_cast<std::size_t>((h * panels + i / panel_) * tiles + tile)];
      if (plans_[static_cast<std::size_t>(h)].form == ADAATTN_DENSE) c = ADAATTN_TILE_HIGH;
      const std::int64_t first = tile * 64, end = std::min(first + 64, visibility_.key_count);
      if (c >= ADAATTN_TILE_SUMMARISED) {
        const bool is_low = c == ADAATTN_TILE_LOW || c == ADAATTN_TILE_SUMMARISED_LOW;
        const bool summarised = c == ADAATTN_TILE_SUMMARISED || c == ADAATTN_TILE_SUMMARISED_LOW;
        for (std::int64_t j = first; j < end; ++j) {
          if (!sees(visibility_, i, j)) continue;
          Term term = {(is_low ? low : high)[at][static_cast<std::size_t>(j)], j, 1, j, 1};
          if (summarised) term.first_value = first, term.value_count = end - first;
          result.push_back(term);
        }
      } else if (c == ADAATTN_TILE_POOLED) {
        for (std::int64_t pool = first; pool < end; pool += 16) {
          double score = 0;
          for (std::int64_t x = 0; x < s_.dim; ++x)
            score += in_.q[static_cast<std::size_t>((h * s_.queries + i) * s_.dim + x)] *
                     mean_of(in_.k, key_head * s_.keys + pool, s_.dim, x, 16);
          result.push_back({score / std::sqrt(static_cast<double>(s_.dim)) + std::log(16.0), pool, 16, pool, 16});
        }
      }
    }
    return result;
  }

  void run_head(std::int64_t h) {
    const std::int64_t key_head = h / (s_.query_heads / s_.key_heads), keys = key_head * s_.keys;
    const adaattn_head_plan& plan = plans_[static_cast<std::size_t>(h)];
    const std::vector<Values> high = scores(h, key_head, plan.precision), low = scores(h, key_head, plan.low_precision);
    const double scale = 1 / std::sqrt(static_cast<double>(s_.dim));
    const auto at = [](auto& x, std::int64_t row, std::int64_t width, std::int64_t c) -> auto& {
      return x[static_cast<std::size_t>(row * width + c)];
    };
    for (std::int64_t i = 0; i < s_.queries; ++i) {
      const std::int64_t row = h * s_.queries + i;
      const std::vector<Term> all = terms(h, key_head, i, high, low);
      double sum = 0, delta = 0;
      for (const Term& term : all) sum += std::exp(term.score);
      lse[static_cast<std::size_t>(row)] = std::log(sum);
      Values towards(static_cast<std::size_t>(visibility_.key_count)), weight(towards.size());  // dO . v and P, by key
      for (std::int64_t j = 0; j < visibility_.key_count; ++j)
        for (std::int64_t c = 0; c < s_.value_dim; ++c)
          towards[static_cast<std::size_t>(j)] +=
              static_cast<double>(at(in_.dout, row, s_.value_dim, c)) * at(in_.v, keys + j, s_.value_dim, c);
      Values dp;
      for (const Term& term : all) {
        const double p = std::exp(term.score) / sum, share = 1 / static_cast<double>(term.value_count);
        double product = 0;
        for (std::int64_t j = term.first_value; j < term.first_value + term.value_count; ++j) {
          product += share * towards[static_cast<std::size_t>(j)];
          weight[static_cast<std::size_t>(j)] += share * p;
        }
        dp.push_back(product);
        delta += p * product;
      }
      for (std::int64_t j = 0; j < visibility_.key_count; ++j)
        for (std::int64_t c = 0; c < s_.value_dim; ++c) {
          at(out, row, s_.value_dim, c) += weight[static_cast<std::size_t>(j)] * at(in_.v, keys + j, s_.value_dim, c);
          at(dv, keys + j, s_.value_dim, c) += weight[static_cast<std::size_t>(j)] * at(in_.dout, row, s_.value_dim, c);
        }
      for (std::size_t t = 0; t < all.size(); ++t) {
        const Term& term = all[t];
        const double share = std::exp(term.score) / sum * (dp[t] - delta) * scale / static_cast<double>(term.key_count);
        for (std::int64_t j = keys + term.first_key; j < keys + term.first_key + term.key_count; ++j)
          for (std::int64_t c = 0; c < s_.dim; ++c) {
            at(dq, row, s_.dim, c) += share * at(in_.k, j, s_.dim, c);
            at(dk, j, s_.dim, c) += share * at(in_.q, row, s_.dim, c);
          }
      }
    }
  }

  const Shape& s_;
  const Inputs& in_;
  std::int64_t panel_;
  const std::vector<std::uint8_t>& classes_;
  const std::vector<adaattn_head_plan>& plans_;
  Visibility visibility_;
};

}  // namespace adaattn::testing
