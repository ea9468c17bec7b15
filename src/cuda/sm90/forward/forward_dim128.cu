// Head sizes up to 128.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Dim128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128Fine>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Half128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Half128Fine>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
