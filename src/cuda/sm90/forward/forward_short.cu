// Short sequences.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Short64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Short64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Short128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Short128>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
