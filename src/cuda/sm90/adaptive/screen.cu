#include "cuda/common/check.h"
#include "cuda/common/device.h"
#include "cuda/common/once.h"
#include "cuda/sm90/adaptive/screen.cuh"

namespace adaattn::cuda::sm90 {
namespace {

// As long as the maxima leave room for two blocks of threads on a multiprocessor, six warpgroups, whose 72 registers
// hold one product each: with two each, four would fit, at 96 registers, for which the compiler puts the products one
// after the other. Then three with two strips each, then with one.
using Usual = ScreenConfig<3, 2, 1, 8, false>;
constexpr int kUsualBlocks = 128;
using Long = ScreenConfig<3, 1, 2, 6>;
constexpr int kLongBlocks = 256;
using ForMany = ScreenConfig<3, 1, 1, 6>;
static_assert(2 * (ScreenShared<Usual>::bytes(kUsualBlocks) + 1024) <= 228 * 1024, "two fit a multiprocessor");
static_assert(ScreenShared<Long>::bytes(kLongBlocks) <= 227 * 1024, "a block of threads has no more");
static_assert(ScreenShared<ForMany>::bytes(kMostBlocks) <= 227 * 1024, "a block of threads has no more");

template <typename T, int kDim, typename Config>
void launch(const ScreenParams& params, int most_blocks, cudaStream_t stream) {
  const auto kernel = screen_kernel<T, kDim, Config>;
  static OncePerDevice prepared;
  prepared.run(current_device().index, [&] {
    ADAATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            ScreenShared<Config>::bytes(most_blocks)));
  });
  const AdaptiveShape& shape = params.shape;
  const int units = (shape.screen_strips() + Config::kStrips - 1) / Config::kStrips * shape.group;
  const int blocks = (units + Config::kConsumers - 1) / Config::kConsumers * shape.key_heads();
  if (blocks == 0) return;
  kernel<<<blocks, Config::kThreads, ScreenShared<Config>::bytes(shape.blocks()), stream>>>(params);
  ADAATTN_CUDA_CHECK(cudaGetLastError());
}

template <typename T, int kDim>
void launch_sized(const ScreenParams& params, cudaStream_t stream) {
  if (params.shape.blocks() <= kUsualBlocks)
    launch<T, kDim, Usual>(params, kUsualBlocks, stream);
  else if (params.shape.blocks() <= kLongBlocks)
    launch<T, kDim, Long>(params, kLongBlocks, stream);
  else
    launch<T, kDim, ForMany>(params, kMostBlocks, stream);
}

template <typename T>
void launch_typed(const ScreenParams& params, cudaStream_t stream) {
  if (params.shape.dim == 64)
    launch_sized<T, 64>(params, stream);
  else
    launch_sized<T, 128>(params, stream);
}

}  // namespace

void launch_screen(const AdaptiveShape& shape, Rows16 q, const AdaptiveArrays& arrays, cudaStream_t stream) {
  const ScreenParams params{.shape = shape, .q = q, .arrays = arrays};
  if (shape.bfloat16)
    launch_typed<__nv_bfloat16>(params, stream);
  else
    launch_typed<__half>(params, stream);
}

}  // namespace adaattn::cuda::sm90
