// Head sizes up to 256.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Dim256>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, Dim256>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
