// Variants for float32 that wait to be measured.
#include "cuda/sm90/float32/tiles.h"
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<float, Float64Narrow>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float128Narrow>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float64Turns>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float128Turns>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float64First>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float128First>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float128Both>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
