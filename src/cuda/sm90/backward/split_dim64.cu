// Head sizes up to 64 and many queries.
#include "cuda/sm90/backward/launch.cuh"
#include "cuda/sm90/backward/split.cuh"

namespace adaattn::cuda::sm90 {

template <typename T, typename Config>
void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  launch_around<T, Config, sizeof(SplitShared<Config>)>(split_backward_kernel<T, Config>, params, stream);
}

template void launch_backward<__nv_bfloat16, SplitDim64>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, SplitDim64>(const BackwardParams&, cudaStream_t);

}  // namespace adaattn::cuda::sm90
