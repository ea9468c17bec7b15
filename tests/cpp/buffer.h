// A strided tensor in poisoned memory: shows whether a kernel wrote every element of it, and nothing around it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cases.h"
#include "common/dtype.h"
#include "common/tensor.h"

namespace adaattn::testing {

// A fixed sequence of standard normal numbers, the same on every machine (SplitMix64, Box-Muller).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  double uniform() {  // in (0, 1)
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (static_cast<double>((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
  }
  float normal() {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return static_cast<float>(radius * std::cos(6.283185307179586 * uniform()));
  }

 private:
  std::uint64_t state_;
};

class Buffer {
 public:
  Buffer() = default;
  Buffer(std::array<std::int64_t, 4> shape, adaattn_dtype dtype, cases::Layout layout, bool written = false) {
    const auto [b, h, n, d] = shape;
    std::array<std::int64_t, 4> stride = {h * n * d, n * d, d, 1};
    switch (layout) {
      case cases::Layout::kContiguous: break;
      case cases::Layout::kTokensFirst: stride = {n * h * d, d, h * d, 1}; break;
      case cases::Layout::kPaddedRows: stride = {h * (n * (d + 3) + 5), n * (d + 3) + 5, d + 3, 1}; break;
      case cases::Layout::kReversedTokens: stride = {h * n * d, n * d, -d, 1}; break;
      case cases::Layout::kStridedDim: stride = {h * n * d * 3, n * d * 3, d * 3, 3}; break;
      case cases::Layout::kBroadcastHeads:
        if (!written) stride = {n * d, 0, d, 1};
        break;
    }
    std::int64_t low = 0, high = 0;
    bool empty = false;
    for (int axis = 0; axis < 4; ++axis) {
      tensor_.shape[axis] = shape[axis];
      tensor_.stride[axis] = stride[axis];
      empty = empty || shape[axis] == 0;
      const std::int64_t reach = (shape[axis] - 1) * stride[axis];
      (reach < 0 ? low : high) += reach;
    }
    tensor_.dtype = dtype;
    tensor_.device = ADAATTN_CPU;
    bytes_.resize(static_cast<std::size_t>((empty ? 0 : high - low + 1) * element_size() + 2 * kGuard));
    poison();
    origin_ = empty ? 0 : -low;
    // A view without elements points nowhere: a kernel that reads it is found out.
    tensor_.data = empty ? nullptr : bytes_.data() + kGuard + origin_ * element_size();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;

  const adaattn_tensor& tensor() const { return tensor_; }
  std::int64_t elements() const { return tensor_.shape[0] * tensor_.shape[1] * tensor_.shape[2] * tensor_.shape[3]; }

  void poison() {  // every 2 and every 4 bytes of it are a NaN that no arithmetic yields
    std::fill(bytes_.begin(), bytes_.end(), kPoison);
  }

  template <typename Function>  // value(b, h, n, d) -> float
  void fill(Function&& value) {
    for_each([&](auto b, auto h, auto n, auto d) {
      const std::int64_t at = offset_of(tensor_, b, h, n, d);
      if (tensor_.dtype == ADAATTN_BOOL)
        static_cast<std::uint8_t*>(tensor_.data)[at] = value(b, h, n, d) != 0 ? 1 : 0;
      else
        store_element(tensor_.data, at, tensor_.dtype, value(b, h, n, d));
    });
  }
  void fill_normal(std::uint64_t seed, float spread = 1) {
    Random random(seed);
    fill([&](auto...) { return spread * random.normal(); });
  }

  // The elements in [b, h, n, d] order. Booleans read as 0 and 1.
  std::vector<double> values() const {
    std::vector<double> result;
    result.reserve(static_cast<std::size_t>(elements()));
    for_each([&](auto b, auto h, auto n, auto d) {
      const std::int64_t at = offset_of(tensor_, b, h, n, d);
      result.push_back(tensor_.dtype == ADAATTN_BOOL ? static_cast<const std::uint8_t*>(tensor_.data)[at]
                                                     : load_element(tensor_.data, at, tensor_.dtype));
    });
    return result;
  }

  // "" if every element was written since poison() and no byte outside of the view was, else what is wrong.
  std::string complaint() const {
    std::vector<std::byte> outside = bytes_;
    std::string first;
    for_each([&](auto b, auto h, auto n, auto d) {
      const std::int64_t from = kGuard + (origin_ + offset_of(tensor_, b, h, n, d)) * element_size();
      bool untouched = true;
      for (std::int64_t i = from; i < from + element_size(); ++i) {
        untouched = untouched && bytes_[static_cast<std::size_t>(i)] == kPoison;
        outside[static_cast<std::size_t>(i)] = kPoison;
      }
      if (untouched && first.empty())
        first = "element [" + std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(n) + ", " +
                std::to_string(d) + "] was not written";
    });
    for (std::size_t i = 0; i < outside.size() && first.empty(); ++i)
      if (outside[i] != kPoison) first = "byte " + std::to_string(i) + " outside of the view was written";
    return first;
  }

 private:
  static constexpr std::int64_t kGuard = 256;  // bytes on either side, a multiple of every alignment
  static constexpr std::byte kPoison{0xFF};

  std::int64_t element_size() const { return dtype_size(tensor_.dtype); }

  template <typename Function>
  void for_each(Function&& visit) const {
    for (std::int64_t b = 0; b < tensor_.shape[0]; ++b)
      for (std::int64_t h = 0; h < tensor_.shape[1]; ++h)
        for (std::int64_t n = 0; n < tensor_.shape[2]; ++n)
          for (std::int64_t d = 0; d < tensor_.shape[3]; ++d) visit(b, h, n, d);
  }

  adaattn_tensor tensor_{};
  std::vector<std::byte> bytes_;
  std::int64_t origin_ = 0;  // elements between the start of the span and element [0, 0, 0, 0]
};

}  // namespace adaattn::testing
