// What bounds need to know of keys and values: per tile the mean of v and how far v strays from it, and the largest
// norms.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"
#include "common/scratch.h"
#include "cpu/forward_plan.h"

namespace adaattn::cpu {

constexpr std::int64_t kBoundTile = 64;  // keys

struct KeySizes {
  double key, value;  // largest norm of a row of k and of v
  bool finite;        // whether k and v hold only finite values
};

// Of one (batch, key head); arrays in the caller's workspace.
struct ValueTiles {
  float* means;    // [tiles][Dv rounded up to panels]
  float* spreads;  // [tiles] upper bound of the largest singular value of the tile's v less their mean
  KeySizes* sizes;
};

// Of one thread.
struct ValueTilesScratch {
  float* rows;            // [kBoundTile][width]
  float* transposed;      // [Dv][kBoundTile]
  float *gram, *squared;  // [kBoundTile][kBoundTile]
};

inline std::size_t bound_tiles(const adaattn_forward_args& args) {
  return static_cast<std::size_t>((args.k.shape[2] + kBoundTile - 1) / kBoundTile);
}

inline ValueTiles lay_out_value_tiles(const adaattn_forward_args& args, Scratch& scratch) {
  const std::size_t tiles = bound_tiles(args);
  return {.means = scratch.take<float>(tiles * padded_width(args.v.shape[3])),
          .spreads = scratch.take<float>(tiles),
          .sizes = scratch.take<KeySizes>(1)};
}

inline ValueTilesScratch lay_out_value_tiles_thread(const adaattn_forward_args& args, Scratch& scratch) {
  constexpr auto kKeys = static_cast<std::size_t>(kBoundTile);
  return {.rows = scratch.take<float>(kKeys * padded_width(std::max(args.q.shape[3], args.v.shape[3]))),
          .transposed = scratch.take<float>(static_cast<std::size_t>(args.v.shape[3]) * kKeys),
          .gram = scratch.take<float>(kKeys * kKeys),
          .squared = scratch.take<float>(kKeys * kKeys)};
}

// with_spreads false leaves means and spreads unwritten. Keys past the batch entry's length are not read.
void build_value_tiles(const adaattn_forward_args& args, std::int64_t b, std::int64_t key_head, bool with_spreads,
                       const ValueTilesScratch& scratch, const ValueTiles& tiles);

}  // namespace adaattn::cpu
