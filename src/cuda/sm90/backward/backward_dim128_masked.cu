// Head sizes up to 128, some tiles longer than others.
#include "cuda/sm90/backward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_backward<__nv_bfloat16, BackwardDim128Masked<false>>(const BackwardParams&, const RowParams&,
                                                                          cudaStream_t);
template void launch_backward<__nv_bfloat16, BackwardDim128Masked<true>>(const BackwardParams&, const RowParams&,
                                                                         cudaStream_t);
template void launch_backward<__half, BackwardDim128Masked<false>>(const BackwardParams&, const RowParams&,
                                                                   cudaStream_t);
template void launch_backward<__half, BackwardDim128Masked<true>>(const BackwardParams&, const RowParams&,
                                                                  cudaStream_t);

}  // namespace adaattn::cuda::sm90
