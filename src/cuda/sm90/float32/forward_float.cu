// Float32, head sizes up to 128.
#include "cuda/sm90/float32/tiles.h"
#include "cuda/sm90/forward/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_forward<float, Float64>(const ForwardParams&, const ForwardLaunch&);
template void launch_forward<float, Float128>(const ForwardParams&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
