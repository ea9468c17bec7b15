// The CUDA devices of this machine. Loads, and answers, without a driver too.
#pragma once

#include <string>
#include <vector>

namespace adaattn::cuda {

struct Device {
  int index;
  int capability;  // 10 * major + minor
  int multiprocessors;
};

// The calling thread's current device, where every call runs. Throws if there is none. Asks the driver once a device:
// calls on few rows take so little time that asking it every time shows.
Device current_device();

// Whether the current device exists and has this compute capability, or at least this.
bool current_device_is(int capability);
bool current_device_reaches(int capability);

}  // namespace adaattn::cuda
