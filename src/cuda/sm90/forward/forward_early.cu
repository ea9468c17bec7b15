// Variants that wait to be measured: turns passed on early; the last wave of tiles in parts.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Dim64Early>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim64Early>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128Early>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128Early>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128MaskedEarly>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128MaskedEarly>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128Parts>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128Parts>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
