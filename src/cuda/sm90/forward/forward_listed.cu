// Listed blocks of keys, head sizes up to 128.
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<__nv_bfloat16, Listed64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__nv_bfloat16, Listed128>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, ListedHalf64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<__half, ListedHalf128>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
