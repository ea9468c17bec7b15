// Turns fuzzer bytes into tensors, memory and options: mostly sound ones, each part now and then hostile.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "adaattn/adaattn.h"
#include "common/dtype.h"

namespace adaattn::fuzz {

using Shape = std::array<std::int64_t, 4>;

class Hostile {
 public:
  Hostile(const std::uint8_t* data, std::size_t size) : bytes_(data, size) {}

  // True about once in n times; never when the input has run out, so that short inputs are sound calls.
  bool once_in(int n) { return bytes_.ConsumeIntegralInRange(0, n - 1) == n - 1; }
  template <typename T>
  T in(T low, T high) {
    return bytes_.ConsumeIntegralInRange<T>(low, high);
  }
  template <typename T, std::size_t n>
  T one_of(const T (&values)[n]) {
    return bytes_.PickValueInArray(values);
  }

  std::int64_t wild_integer() {
    constexpr std::int64_t kWild[] = {
        -1, 0, 1, -2, 7, INT32_MAX, INT64_MIN, INT64_MAX, INT64_MAX / 2, INT64_MIN + 1, 1 << 20};
    return once_in(2) ? bytes_.ConsumeIntegral<std::int64_t>() : one_of(kWild);
  }
  double wild_number() {
    const double kWild[] = {0, -0.0, -1, 1e-300, 1e300, std::numeric_limits<double>::infinity(), std::nan("")};
    return once_in(2) ? bytes_.ConsumeFloatingPoint<double>() : one_of(kWild);
  }
  std::int64_t count() {  // heads, tokens
    constexpr std::int64_t kCounts[] = {1, 2, 3, 4, 8, 13, 16, 17, 33, 64, 65, 70, 1030, 0};
    return one_of(kCounts);
  }
  std::int64_t dim() {
    constexpr std::int64_t kDims[] = {1, 2, 8, 16, 17, 31, 64, 65, 128, 256, 257, 300, 0};
    return one_of(kDims);
  }
  std::int32_t dtype() {
    constexpr std::int32_t kDtypes[] = {ADAATTN_FLOAT32, ADAATTN_FLOAT16, ADAATTN_BFLOAT16};
    return one_of(kDtypes);
  }

  // A tensor in memory of exactly its span, so that the address sanitizer sees every step outside of it. Where the span
  // cannot be had (hostile strides), data is NULL: only a refusal is right then.
  adaattn_tensor tensor(Shape shape, std::int32_t dtype) {
    adaattn_tensor t{};
    t.dtype = once_in(64) ? static_cast<std::int32_t>(wild_integer()) : dtype;
    t.device = once_in(128) ? static_cast<std::int32_t>(wild_integer()) : ADAATTN_CPU;
    std::int64_t next = 1;
    constexpr int kOrders[3][4] = {{3, 2, 1, 0}, {3, 1, 2, 0}, {2, 3, 1, 0}};
    const auto& order = kOrders[in(0, 2)];
    for (const int axis : order) {
      t.shape[axis] = once_in(128) ? wild_integer() : shape[axis];
      t.stride[axis] = next * (once_in(8) ? -1 : 1) * (once_in(16) ? 2 : 1);
      if (once_in(32)) t.stride[axis] = 0;
      if (once_in(64)) t.stride[axis] = in<std::int64_t>(-40, 40);
      if (once_in(128)) t.stride[axis] = wild_integer();
      next *= t.shape[axis] > 0 && t.shape[axis] < 1000 ? t.shape[axis] : 1;
    }
    t.data = memory(t);
    return t;
  }

  // `size` bytes, aligned as asked, at an exact end; contents from the input, then a pattern with NaN and infinities.
  std::byte* bytes(std::size_t size, std::size_t alignment) {
    const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
    auto* raw = static_cast<std::byte*>(std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded));
    held_.emplace_back(raw);
    return raw + (rounded - size) / alignment * alignment;
  }

  float* floats(std::int64_t count) {
    if (count < 0 || count > kMost) return nullptr;
    auto* data = reinterpret_cast<float*>(exactly(static_cast<std::size_t>(count) * sizeof(float)));
    for (std::int64_t i = 0; i < count; ++i) data[i] = in(-8, 8) * 0.5f;
    return once_in(64) ? reinterpret_cast<float*>(reinterpret_cast<std::byte*>(data) + 1) : data;
  }

  std::int64_t* lengths(std::int64_t batch, std::int64_t keys) {
    if (batch < 0 || batch > kMost) return nullptr;
    auto* data = reinterpret_cast<std::int64_t*>(exactly(static_cast<std::size_t>(batch) * sizeof(std::int64_t)));
    for (std::int64_t b = 0; b < batch; ++b)
      data[b] = once_in(32) ? wild_integer() : in<std::int64_t>(0, keys < 0 ? 0 : keys);
    return data;
  }

  adaattn_options options() {
    adaattn_options o = adaattn_default_options();
    o.num_threads = in(1, 2);
    if (once_in(2)) o.causal = 1;
    if (once_in(3)) o.alignment = ADAATTN_BOTTOM_RIGHT;
    if (once_in(3)) o.window_left = in(0, 80);
    if (once_in(3)) o.window_right = in(0, 80);
    if (once_in(3)) o.sinks = in(0, 20);
    if (once_in(4)) o.has_scale = 1, o.scale = in(-100, 100) * 0.01;
    if (once_in(8)) o.error = in(0, 100) * 0.001;
    constexpr const char* kKernels[] = {"cpu_flash", "cpu_adaptive",   "cpu_decode", "reference_fp64",
                                        "",          "no such kernel", "cpu_flas"};
    if (once_in(4)) o.kernel = one_of(kKernels);
    if (once_in(32)) o.scale = wild_number(), o.has_scale = 1;
    if (once_in(64)) o.error = wild_number();
    if (once_in(64)) o.alignment = static_cast<std::int32_t>(wild_integer());
    if (once_in(32)) o.window_left = wild_integer();
    if (once_in(32)) o.window_right = wild_integer();
    if (once_in(32)) o.sinks = wild_integer();
    if (once_in(64)) o.num_threads = static_cast<std::int32_t>(wild_integer());
    return o;
  }

 private:
  static constexpr std::int64_t kMost = 1 << 16;  // elements of one tensor

  struct Free {
    void operator()(std::byte* pointer) const { std::free(pointer); }
  };

  // Elements are 8 bytes or less, and malloc's own bounds are exact for the sanitizer.
  std::byte* exactly(std::size_t size) {
    auto* raw = static_cast<std::byte*>(std::malloc(size == 0 ? 1 : size));
    held_.emplace_back(raw);
    std::memset(raw, 0, size);
    return raw;
  }

  void* memory(const adaattn_tensor& t) {
    std::int64_t low = 0, high = 0;
    for (int axis = 0; axis < 4; ++axis) {
      if (t.shape[axis] <= 0) return once_in(2) ? nullptr : exactly(1);
      std::int64_t reach = 0;
      if (__builtin_mul_overflow(t.shape[axis] - 1, t.stride[axis], &reach) || reach > kMost || reach < -kMost)
        return nullptr;
      (reach < 0 ? low : high) += reach;
    }
    if (once_in(128)) return nullptr;
    const std::int64_t size = dtype_size(t.dtype), count = high - low + 1;
    std::byte* raw = exactly(static_cast<std::size_t>(count * size));
    if (t.dtype == ADAATTN_BOOL) {
      for (std::int64_t i = 0; i < count; ++i) raw[i] = static_cast<std::byte>(in(0, 1));
    } else {
      constexpr float kSpecial[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                                    std::numeric_limits<float>::quiet_NaN(), 3e38f, 1e-40f};
      const bool special = once_in(8);
      std::uint32_t state = in(0u, 0xFFFFu);
      for (std::int64_t i = 0; i < count; ++i) {
        state = state * 1664525u + 1013904223u;
        const float plain = static_cast<float>(state >> 16) * 0x1p-14f - 2;
        store_element(raw, i, t.dtype, special && i % 7 == 3 ? kSpecial[i / 7 % 5] : plain);
      }
    }
    std::byte* at = raw - low * size;
    return once_in(128) && size > 1 ? at + 1 : at;  // off its alignment: refused before it is read
  }

  FuzzedDataProvider bytes_;
  std::vector<std::unique_ptr<std::byte, Free>> held_;
};

}  // namespace adaattn::fuzz
