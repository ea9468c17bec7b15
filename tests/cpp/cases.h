// The attention problems that tests and benchmarks run, as data: a struct and lists of it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"

namespace adaattn::cases {

enum class MaskKind {
  kNone,
  kBool,                // [B, Hq, Nq, Nk]
  kBoolKeyPadding,      // [B, 1, 1, Nk]
  kBoolHidesWholeRows,  // [1, 1, Nq, 1]
  kAdditiveFloat32,     // [B, 1, Nq, Nk] float32, some entries -inf
  kAdditiveSameDtype,   // [1, Hq, Nq, Nk] in the dtype of q
};

enum class Layout {
  kContiguous,
  kTokensFirst,     // stored [B, N, H, D]
  kPaddedRows,      // gaps between rows, and between heads
  kReversedTokens,  // negative stride over tokens
  kStridedDim,      // every third element
  kBroadcastHeads,  // stride 0 over heads; outputs, which need their own place, are contiguous
};

struct Case {
  std::string name;
  std::int64_t batch = 1, query_heads = 2, key_heads = 2, queries = 37, keys = 45, dim = 64;
  std::int64_t value_dim = 0;  // 0: dim
  adaattn_dtype dtype = ADAATTN_FLOAT32;
  bool causal = false;
  adaattn_alignment alignment = ADAATTN_TOP_LEFT;
  std::int64_t window_left = -1, window_right = -1, sinks = 0;
  MaskKind mask = MaskKind::kNone;
  bool key_lengths = false;  // from none to all of the keys, different in every batch entry
  Layout layout = Layout::kContiguous;
  std::optional<double> scale = std::nullopt;
  float spread = 1;  // standard deviation of the elements of q and k

  std::int64_t dv() const { return value_dim == 0 ? dim : value_dim; }
};

inline constexpr std::array kDtypes = {ADAATTN_FLOAT32, ADAATTN_FLOAT16, ADAATTN_BFLOAT16};

inline const char* suffix(adaattn_dtype dtype) {
  return dtype == ADAATTN_FLOAT32 ? "f32" : dtype == ADAATTN_FLOAT16 ? "f16" : "bf16";
}

// One feature or size at a time, in every dtype.
inline std::vector<Case> correctness() {
  std::vector<Case> one_dtype;
  for (const std::int64_t dim : {1,  2,  3,  5,  7,  8,  9,   15,  16,  17,  24,  31,  32,  33,  40,  48,
                                 63, 64, 65, 72, 80, 96, 127, 128, 129, 160, 191, 192, 200, 224, 255, 256})
    one_dtype.push_back({.name = "dim" + std::to_string(dim), .dim = dim, .causal = dim % 2 == 1});
  const auto more = {
      Case{.name = "value_dim_smaller", .dim = 64, .value_dim = 40},
      Case{.name = "value_dim_larger", .dim = 24, .value_dim = 128},
      Case{.name = "one_query", .queries = 1, .keys = 300},
      Case{.name = "one_key", .queries = 70, .keys = 1},
      Case{.name = "one_query_one_key", .queries = 1, .keys = 1},
      Case{.name = "tile_sizes", .queries = 128, .keys = 256, .causal = true},
      Case{.name = "just_over_tiles", .queries = 129, .keys = 257},
      Case{.name = "many_keys", .query_heads = 1, .key_heads = 1, .queries = 20, .keys = 1100, .dim = 32},
      Case{.name = "many_short", .batch = 9, .query_heads = 3, .key_heads = 3, .queries = 13, .keys = 13, .dim = 32},
      Case{.name = "grouped", .batch = 2, .query_heads = 6, .key_heads = 2, .causal = true},
      Case{.name = "multi_query", .query_heads = 5, .key_heads = 1, .dim = 40},
      Case{.name = "causal_more_keys", .queries = 50, .keys = 150, .causal = true},
      Case{.name = "causal_more_queries", .queries = 150, .keys = 50, .causal = true},
      Case{.name = "bottom_right", .queries = 50, .keys = 150, .causal = true, .alignment = ADAATTN_BOTTOM_RIGHT},
      // The first 100 queries stand before every key: zeros and -inf.
      Case{.name = "bottom_right_hidden_rows",
           .queries = 150,
           .keys = 50,
           .causal = true,
           .alignment = ADAATTN_BOTTOM_RIGHT},
      Case{.name = "window", .queries = 150, .keys = 150, .window_left = 20, .window_right = 7},
      Case{.name = "window_causal", .queries = 200, .keys = 200, .causal = true, .window_left = 33},
      Case{.name = "window_sinks", .queries = 200, .keys = 200, .causal = true, .window_left = 30, .sinks = 4},
      Case{.name = "window_bottom_right_sinks",
           .queries = 40,
           .keys = 230,
           .causal = true,
           .alignment = ADAATTN_BOTTOM_RIGHT,
           .window_left = 65,
           .sinks = 70},
      Case{.name = "window_self_only", .queries = 70, .keys = 70, .window_left = 0, .window_right = 0},
      Case{.name = "window_past_the_keys", .queries = 150, .keys = 60, .window_left = 10, .window_right = 0},
      Case{.name = "mask_bool", .batch = 2, .mask = MaskKind::kBool},
      Case{.name = "mask_bool_causal", .queries = 90, .keys = 90, .causal = true, .mask = MaskKind::kBool},
      Case{.name = "mask_key_padding", .batch = 3, .mask = MaskKind::kBoolKeyPadding},
      Case{.name = "mask_hides_rows", .batch = 2, .mask = MaskKind::kBoolHidesWholeRows},
      Case{.name = "mask_additive", .batch = 2, .queries = 80, .keys = 140, .mask = MaskKind::kAdditiveFloat32},
      Case{.name = "mask_additive_same", .batch = 2, .mask = MaskKind::kAdditiveSameDtype},
      Case{.name = "key_lengths", .batch = 5, .queries = 60, .keys = 140, .key_lengths = true},
      Case{.name = "key_lengths_bottom_right",
           .batch = 5,
           .queries = 60,
           .keys = 140,
           .causal = true,
           .alignment = ADAATTN_BOTTOM_RIGHT,
           .key_lengths = true},
      Case{.name = "everything",
           .batch = 3,
           .query_heads = 4,
           .queries = 77,
           .keys = 133,
           .dim = 72,
           .value_dim = 56,
           .causal = true,
           .alignment = ADAATTN_BOTTOM_RIGHT,
           .window_left = 50,
           .sinks = 3,
           .mask = MaskKind::kBool,
           .key_lengths = true,
           .layout = Layout::kTokensFirst},
      // Few query rows a key head, as in decoding with a KV cache.
      Case{.name = "decode_grouped", .batch = 2, .query_heads = 8, .queries = 1, .keys = 700},
      Case{.name = "decode_multi_query", .query_heads = 8, .key_heads = 1, .queries = 1, .keys = 300, .dim = 129},
      Case{.name = "decode_lengths",
           .batch = 4,
           .query_heads = 4,
           .queries = 2,
           .keys = 600,
           .causal = true,
           .alignment = ADAATTN_BOTTOM_RIGHT,
           .key_lengths = true},
      Case{.name = "decode_mask",
           .batch = 2,
           .queries = 3,
           .keys = 280,
           .mask = MaskKind::kAdditiveFloat32,
           .layout = Layout::kTokensFirst},
      Case{.name = "decode_mask_bool", .queries = 2, .keys = 280, .mask = MaskKind::kBool},
      Case{.name = "decode_window_sinks",
           .queries = 4,
           .keys = 900,
           .dim = 40,
           .causal = true,
           .alignment = ADAATTN_BOTTOM_RIGHT,
           .window_left = 257,
           .sinks = 5},
      Case{.name = "decode_strided", .batch = 2, .queries = 4, .keys = 270, .layout = Layout::kStridedDim},
      Case{.name = "tokens_first", .batch = 2, .layout = Layout::kTokensFirst},
      Case{.name = "padded_rows", .batch = 2, .layout = Layout::kPaddedRows},
      Case{.name = "reversed_tokens", .batch = 2, .causal = true, .layout = Layout::kReversedTokens},
      Case{.name = "strided_dim", .batch = 2, .layout = Layout::kStridedDim},
      Case{.name = "broadcast_heads", .batch = 2, .query_heads = 4, .key_heads = 2, .layout = Layout::kBroadcastHeads},
      Case{.name = "scale_given", .scale = 0.3},
      Case{.name = "scale_zero", .scale = 0.0},
      Case{.name = "scale_negative", .causal = true, .scale = -0.125},
      Case{.name = "peaked", .queries = 70, .keys = 200, .spread = 4},
  };
  one_dtype.insert(one_dtype.end(), more.begin(), more.end());
  std::vector<Case> all;
  for (const adaattn_dtype dtype : kDtypes)
    for (Case c : one_dtype) {
      c.name += std::string("_") + suffix(dtype);
      c.dtype = dtype;
      all.push_back(c);
    }
  return all;
}

// Empty dimensions: nothing to compute, or rows without keys.
inline std::vector<Case> corner() {
  return {
      {.name = "no_batch", .batch = 0},
      {.name = "no_heads", .query_heads = 0, .key_heads = 0},
      {.name = "no_queries", .queries = 0},
      {.name = "no_keys", .keys = 0},
      {.name = "no_keys_f16", .keys = 0, .dtype = ADAATTN_FLOAT16},
      {.name = "no_keys_causal", .keys = 0, .causal = true, .alignment = ADAATTN_BOTTOM_RIGHT},
      {.name = "nothing_at_all", .batch = 0, .query_heads = 0, .key_heads = 0, .queries = 0, .keys = 0},
  };
}

}  // namespace adaattn::cases
