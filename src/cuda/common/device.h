// The CUDA devices of this machine. Loads, and answers, without a driver too.
#pragma once

#include <string>
#include <vector>

namespace adaattn::cuda {

struct Device {
  int capability;  // 10 * major + minor
  int multiprocessors;
};

// The calling thread's current device, where every call runs. Throws if there is none.
Device current_device();

// Whether the current device exists and has this compute capability.
bool current_device_is(int capability);

}  // namespace adaattn::cuda
