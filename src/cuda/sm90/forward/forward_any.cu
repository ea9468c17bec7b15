// Mask tensors and row statistics, any head size.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Any64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Any64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Any128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Any128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Any256>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Any256>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
