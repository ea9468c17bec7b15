// Copies of one key head's keys and values in bfloat16 and int8, laid out for dot products inside 32-bit lanes.
//
// Keys are taken less a mean that all share, which moves every score of a row by the same amount. int8: one scale per
// key, and per channel and tile for values, which are taken less their tile's mean: that mean times the tile's mass is
// added in float32. No cast saturates: scales come from the largest magnitude.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"
#include "plan/head_plan.h"

namespace adaattn::cpu {

constexpr std::int64_t kClassTile = 64;  // keys of the tiles that are classed

struct Quantized {
  std::uint8_t* k8;    // [Nk in whole tiles][D in fours], 128 more than the value
  float* k8_scale;     // [Nk in whole tiles]
  std::int8_t* v8;     // [Nk in whole tiles / 4][Dv][4 keys]
  float* v8_scale;     // [tiles][Dv]
  std::uint16_t* k16;  // [Nk in whole tiles][D in twos]
  std::uint16_t* v16;  // [Nk in whole tiles / 2][Dv][2 keys]
};

// Which copies there are.
struct Copies {
  bool int8, bfloat16;
};

// Those that a head with this plan reads.
inline Copies copies_of(const adaattn_head_plan& plan) {
  return {.int8 = uses_precision(plan, ADAATTN_PRECISION_INT8),
          .bfloat16 = uses_precision(plan, ADAATTN_PRECISION_BFLOAT16)};
}

constexpr std::size_t whole(std::size_t count, std::size_t of) { return (count + of - 1) / of * of; }

// Of keys alone; keys is a multiple of kClassTile.
inline Quantized lay_out_quantized_keys(std::size_t keys, std::size_t dim, Copies copies, Scratch& scratch) {
  Quantized copy{};
  if (copies.int8) {
    copy.k8 = scratch.take<std::uint8_t>(keys * whole(dim, 4));
    copy.k8_scale = scratch.take<float>(keys);
  }
  if (copies.bfloat16) copy.k16 = scratch.take<std::uint16_t>(keys * whole(dim, 2));
  return copy;
}

inline Quantized lay_out_quantized(const adaattn_forward_args& args, Copies copies, Scratch& scratch) {
  const std::size_t tile = kClassTile, keys = whole(static_cast<std::size_t>(args.k.shape[2]), tile);
  const auto d = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  Quantized copy = lay_out_quantized_keys(keys, d, copies, scratch);
  if (copies.int8) {
    copy.v8 = scratch.take<std::int8_t>(keys * dv);
    copy.v8_scale = scratch.take<float>(keys / tile * dv);
  }
  if (copies.bfloat16) copy.v16 = scratch.take<std::uint16_t>(keys * dv);
  return copy;
}

// Fill the copies of a tile: count <= kClassTile keys from first on, k [count][ld] less the keys' mean, v [count][ld]
// and its mean [Dv] over the tile.
void quantize_keys(const float* k, std::size_t ld, std::size_t dim, std::size_t first, std::size_t count, Copies copies,
                   const Quantized& to);
void quantize_values(const float* v, std::size_t ld, std::size_t dim, const float* mean, std::size_t first,
                     std::size_t count, Copies copies, const Quantized& to);

}  // namespace adaattn::cpu
