// Variants that wait to be measured: consumers with queries of their own, with turns as usual and passed on early.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Dim64Own>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim64Own>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128Own>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128Own>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128MaskedOwn>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128MaskedOwn>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim256Own>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim256Own>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim64Both>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim64Both>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128Both>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128Both>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Dim128MaskedBoth>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim128MaskedBoth>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
