// The tile sizes that are built, and how one of them is launched.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/forward/config.h"

namespace adaattn::cuda::sm90 {

// bfloat16, which keeps references.
using Dim64 = ForwardConfig<ForwardTile{.dim = 64,
                                        .consumers = 3,
                                        .keys = 128,
                                        .stages = 4,
                                        .own_queries = true,
                                        .keeps_reference = true,
                                        .stages_output = true}>;
// Smaller steps waste less at the diagonal and at the end of a short sequence.
using Dim64Fine = ForwardConfig<ForwardTile{.dim = 64,
                                            .consumers = 4,
                                            .keys = 64,
                                            .stages = 4,
                                            .own_queries = true,
                                            .keeps_reference = true,
                                            .stages_output = true}>;
using Dim128 = ForwardConfig<ForwardTile{.dim = 128,
                                         .consumers = 2,
                                         .keys = 128,
                                         .stages = 2,
                                         .own_queries = true,
                                         .keeps_reference = true,
                                         .stages_output = true,
                                         .half_early = true}>;
using Dim128Fine = ForwardConfig<ForwardTile{.dim = 128,
                                             .consumers = 3,
                                             .keys = 64,
                                             .stages = 4,
                                             .own_queries = true,
                                             .keeps_reference = true,
                                             .stages_output = true}>;
// float16, whose range is too small for that.
using Half64 = ForwardConfig<ForwardTile{
    .dim = 64, .consumers = 3, .keys = 128, .stages = 4, .own_queries = true, .stages_output = true}>;
using Half128 = ForwardConfig<ForwardTile{.dim = 128, .consumers = 2, .keys = 176, .stages = 2, .own_queries = true}>;
using Half128Fine = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 128, .stages = 2, .own_queries = true, .stages_output = true}>;
using Dim256 = ForwardConfig<ForwardTile{.dim = 256, .consumers = 2, .keys = 80, .stages = 2, .own_queries = true}>;

// Of listed blocks; 128 keys each.
using Listed64 = ForwardConfig<ForwardTile{.dim = 64,
                                           .consumers = 3,
                                           .keys = 128,
                                           .stages = 4,
                                           .own_queries = true,
                                           .keeps_reference = true,
                                           .listed = true,
                                           .stages_output = true}>;
using Listed128 = ForwardConfig<ForwardTile{.dim = 128,
                                            .consumers = 2,
                                            .keys = 128,
                                            .stages = 2,
                                            .own_queries = true,
                                            .keeps_reference = true,
                                            .listed = true,
                                            .stages_output = true,
                                            .half_early = true}>;
using ListedHalf64 = ForwardConfig<ForwardTile{
    .dim = 64, .consumers = 3, .keys = 128, .stages = 4, .own_queries = true, .listed = true, .stages_output = true}>;
using ListedHalf128 = ForwardConfig<ForwardTile{
    .dim = 128, .consumers = 2, .keys = 128, .stages = 2, .own_queries = true, .listed = true, .stages_output = true}>;

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
using Short64 = ForwardConfig<ForwardTile{
    .dim = 64, .consumers = 1, .keys = 64, .stages = 3, .blocks = 3, .own_queries = true, .stages_output = true}>;
using Short128 =
    ForwardConfig<ForwardTile{.dim = 128, .consumers = 1, .keys = 64, .stages = 3, .blocks = 2, .own_queries = true}>;

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
