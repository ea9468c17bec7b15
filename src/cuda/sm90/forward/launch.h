// The tile sizes that are built, and how one of them is launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

using Dim64 = ForwardConfig<ForwardTile{.dim = 64, .consumers = 3, .keys = 128, .stages = 4}>;
using Dim128 = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 176, .stages = 2}>;
// Smaller steps waste less at the diagonal.
using Dim128Masked = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 128, .stages = 2}>;
using Dim256 = ForwardConfig<ForwardTile{.dim = 256, .consumers = 2, .keys = 80, .stages = 2}>;

// For few rows: memory bounds them, so they keep as many bytes in flight as fit, in two blocks where those do.
using Few64 = ForwardConfig<ForwardTile{.dim = 64,
                                        .consumers = 1,
                                        .keys = 128,
                                        .stages = 3,
                                        .blocks = 2,
                                        .packs = true,
                                        .parts = true,
                                        .own_queries = true}>;
using Few128 = ForwardConfig<ForwardTile{.dim = 128,
                                         .consumers = 1,
                                         .keys = 64,
                                         .stages = 3,
                                         .blocks = 2,
                                         .packs = true,
                                         .parts = true,
                                         .own_queries = true}>;
using Few256 = ForwardConfig<ForwardTile{
    .dim = 256, .consumers = 1, .keys = 64, .stages = 3, .packs = true, .parts = true, .own_queries = true}>;

// For short sequences: tiles that waste fewer rows, and blocks of which some compute while others load.
using Short64 =
    ForwardConfig<ForwardTile{.dim = 64, .consumers = 1, .keys = 64, .stages = 4, .blocks = 3, .own_queries = true}>;
using Short128 =
    ForwardConfig<ForwardTile{.dim = 128, .consumers = 1, .keys = 64, .stages = 3, .blocks = 2, .own_queries = true}>;

// Variants of the usual ones. Early: turns are passed on 128 cycles before a consumer's products end, so that the next
// consumer's are there by then. That may make turns pay with 128 keys a step, too.
using Dim64Early = ForwardConfig<ForwardTile{.dim = 64, .consumers = 3, .keys = 128, .stages = 4, .early_turn = 4}>;
using Dim128Early = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 176, .stages = 2, .early_turn = 2}>;
using Dim128MaskedEarly =
    ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 128, .stages = 2, .early_turn = 2}>;
// Own: consumers go on to their next queries by themselves.
using Dim64Own = ForwardConfig<ForwardTile{.dim = 64, .consumers = 3, .keys = 128, .stages = 4, .own_queries = true}>;
using Dim128Own = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 176, .stages = 2, .own_queries = true}>;
using Dim128MaskedOwn =
    ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 128, .stages = 2, .own_queries = true}>;
using Dim256Own = ForwardConfig<ForwardTile{.dim = 256, .consumers = 2, .keys = 80, .stages = 2, .own_queries = true}>;
// Both.
using Dim64Both = ForwardConfig<ForwardTile{
    .dim = 64, .consumers = 3, .keys = 128, .stages = 4, .early_turn = 4, .own_queries = true}>;
using Dim128Both = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 176, .stages = 2, .early_turn = 2, .own_queries = true}>;
using Dim128MaskedBoth = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 128, .stages = 2, .early_turn = 2, .own_queries = true}>;
// Dim128 whose last tiles, those that would leave most multiprocessors idle, are worked on in parts.
using Dim128Parts = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 176, .stages = 2, .parts = true}>;

// With mask tensors or row statistics.
using Any64 = ForwardConfig<ForwardTile{
    .dim = 64, .consumers = 2, .keys = 64, .stages = 4, .packs = true, .parts = true, .masks = true}>;
using Any128 = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 64, .stages = 3, .packs = true, .parts = true, .masks = true}>;
using Any256 = ForwardConfig<ForwardTile{
    .dim = 256, .consumers = 2, .keys = 64, .stages = 2, .packs = true, .parts = true, .masks = true}>;

struct ForwardLaunch {
  int device;  // the current one
  int blocks;  // of threads, each of which works on items until none is left
  cudaStream_t stream;
};

// With tiles in parts, also launches what combines them.
template <typename T, typename Config>
void launch_forward(const ForwardParams& params, const ForwardLaunch& launch);

}  // namespace adaattn::cuda::sm90
