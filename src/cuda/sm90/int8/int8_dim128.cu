// Head sizes up to 128.
#include "cuda/sm90/int8/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_int8<Int8Dim128>(const Int8Params&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
