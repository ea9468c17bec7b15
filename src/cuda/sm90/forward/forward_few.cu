// Few rows, of any head size.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Few64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Few64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Few128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Few128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Few256>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Few256>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
