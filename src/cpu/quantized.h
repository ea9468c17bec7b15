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

constexpr std::size_t whole(std::size_t count, std::size_t of) { return (count + of - 1) / of * of; }

inline Quantized lay_out_quantized(const adaattn_forward_args& args, Copies copies, Scratch& scratch) {
  const std::size_t tile = kClassTile, keys = whole(static_cast<std::size_t>(args.k.shape[2]), tile);
  const auto d = static_cast<std::size_t>(args.q.shape[3]), dv = static_cast<std::size_t>(args.v.shape[3]);
  Quantized copy{};
  if (copies.int8) {
    copy.k8 = scratch.take<std::uint8_t>(keys * whole(d, 4));
    copy.k8_scale = scratch.take<float>(keys);
    copy.v8 = scratch.take<std::int8_t>(keys * dv);
    copy.v8_scale = scratch.take<float>(keys / tile * dv);
  }
  if (copies.bfloat16) {
    copy.k16 = scratch.take<std::uint16_t>(keys * whole(d, 2));
    copy.v16 = scratch.take<std::uint16_t>(keys * dv);
  }
  return copy;
}

// Fills the copies of a tile: count <= kClassTile keys from first on, k [count][ld_k] less their mean, v [count][ld_v],
// the mean of v [Dv].
void quantize_tile(const float* k, std::size_t ld_k, std::size_t dim, const float* v, std::size_t ld_v,
                   std::size_t dim_v, const float* v_mean, std::size_t first, std::size_t count, Copies copies,
                   const Quantized& to);

}  // namespace adaattn::cpu
