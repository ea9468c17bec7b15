// Head sizes up to 64.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Dim64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim64Fine>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Half64>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
