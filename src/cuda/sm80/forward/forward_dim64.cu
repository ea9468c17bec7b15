// Head sizes up to 64.
#include "cuda/sm80/forward/launch.cuh"

namespace adaattn::cuda::sm80 {

template void launch_forward<__nv_bfloat16, Dim64, false>(const ForwardParams&, int, cudaStream_t);
template void launch_forward<__half, Dim64, false>(const ForwardParams&, int, cudaStream_t);
template void launch_forward<__nv_bfloat16, Dim64, true>(const ForwardParams&, int, cudaStream_t);
template void launch_forward<__half, Dim64, true>(const ForwardParams&, int, cudaStream_t);

}  // namespace adaattn::cuda::sm80
