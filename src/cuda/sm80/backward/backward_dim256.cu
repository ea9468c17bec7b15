// Head sizes up to 256.
#include "cuda/sm80/backward/launch.cuh"

namespace adaattn::cuda::sm80 {

template void launch_backward<__nv_bfloat16, BackwardDim256, false>(const BackwardParams&, const RowParams&,
                                                                    cudaStream_t);
template void launch_backward<__half, BackwardDim256, false>(const BackwardParams&, const RowParams&, cudaStream_t);
template void launch_backward<__nv_bfloat16, BackwardDim256, true>(const BackwardParams&, const RowParams&,
                                                                   cudaStream_t);
template void launch_backward<__half, BackwardDim256, true>(const BackwardParams&, const RowParams&, cudaStream_t);

}  // namespace adaattn::cuda::sm80
