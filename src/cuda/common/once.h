// What a kernel needs done once on each device before its first launch there.
#pragma once

#include <atomic>
#include <cstdint>

namespace adaattn::cuda {

class OncePerDevice {
 public:
  // Calls body unless it has been on this device; two threads at a time may both call it. Without a lock: launches from
  // several threads would meet at it. Devices past the 64th have it called every time.
  template <typename Body>
  void run(int device, const Body& body) {
    const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_acquire) & bit) != 0) return;
    body();
    done_.fetch_or(bit, std::memory_order_release);
  }

 private:
  std::atomic<std::uint64_t> done_{0};
};

}  // namespace adaattn::cuda
