// Variants of the kernel for head sizes up to 128 that wait to be measured.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Dim128Early>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128Early>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128Parts>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128Parts>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
