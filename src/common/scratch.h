// Carves a caller's workspace into aligned arrays, and counts the bytes of the same arrays when there is none yet.
#pragma once

#include <cstddef>

namespace adaattn {

// One function that takes a Scratch both sizes a workspace (null base) and lays it out, so the two cannot differ.
class Scratch {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit Scratch(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <typename T>
  T* take(std::size_t count) {
    T* result = base_ != nullptr ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  std::size_t bytes_ = 0;
};

}  // namespace adaattn
