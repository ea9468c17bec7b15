// Head sizes up to 128 and many queries.
#include "cuda/sm90/backward/kernel.cuh"
#include "cuda/sm90/backward/launch.cuh"

namespace adaattn::cuda::sm90 {

template <typename T, typename Config>
void launch_backward(const BackwardParams& params, cudaStream_t stream) {
  launch_around<T, Config, sizeof(BackwardShared<Config>)>(backward_kernel<T, Config>, params, stream);
}

template void launch_backward<__nv_bfloat16, LateDim128<false, false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, LateDim128<false, true>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, LateDim128<true, false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, LateDim128<true, true>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, LateDim128<false, false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, LateDim128<false, true>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, LateDim128<true, false>>(const BackwardParams&, cudaStream_t);
template void launch_backward<__half, LateDim128<true, true>>(const BackwardParams&, cudaStream_t);

}  // namespace adaattn::cuda::sm90
