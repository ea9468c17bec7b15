// Head sizes up to 64.
#include "cuda/sm90/int8/launch.cuh"

namespace adaattn::cuda::sm90 {

template void launch_int8<Int8Dim64>(const Int8Params&, const ForwardLaunch&);

}  // namespace adaattn::cuda::sm90
