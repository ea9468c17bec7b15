// Head sizes up to 128.
#include "cuda/sm90/backward/kernel.cuh"
#include "cuda/sm90/backward/launch.cuh"

namespace adaattn::cuda::sm90 {

template <typename T, typename Config>
void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  launch_around<T, Config, sizeof(BackwardShared<Config>)>(backward_kernel<T, Config>, params, stream);
}

template void launch_backward<__nv_bfloat16, BackwardDim128<false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, BackwardDim128<true>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, LateDim128<false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, LateDim128<true>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, BackwardDim128<false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, BackwardDim128<true>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, LateDim128<false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, LateDim128<true>>(const BackwardParams&, cudaStream_t);

}  // namespace adaattn::cuda::sm90
