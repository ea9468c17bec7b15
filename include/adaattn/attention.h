// The C++ interface of AdaAttn: the C interface of adaattn.h with views, defaults and exceptions. Header-only, so that
// any C++20 compiler can link the library, whichever one built it.
//
//   adaattn::ForwardArgs args = adaattn::forward_args(q_view, k_view, v_view, out_view);
//   args.options.causal = 1;
//   adaattn::forward(args);            // takes its scratch memory itself; set args.workspace to hand in your own
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "adaattn/adaattn.h"

namespace adaattn {

using Tensor = adaattn_tensor;
using Options = adaattn_options;
using ForwardArgs = adaattn_forward_args;
using BackwardArgs = adaattn_backward_args;
using MergeArgs = adaattn_merge_args;
using MeasureArgs = adaattn_measure_args;

// 16-bit elements by their bits, for compilers without std::float16_t and std::bfloat16_t.
struct float16 {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};

// Thrown by every function below; what() names the argument, what it was and what is allowed.
class Error : public std::invalid_argument {
 public:
  Error(adaattn_status status, const std::string& message) : std::invalid_argument(message), status_(status) {}
  adaattn_status status() const { return status_; }

 private:
  adaattn_status status_;
};

namespace detail {

inline void check(adaattn_status status) {
  if (status != ADAATTN_OK) throw Error(status, adaattn_last_error());
}

template <typename T>
constexpr adaattn_dtype dtype_of() {
  using Element = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<Element, float>)
    return ADAATTN_FLOAT32;
  else if constexpr (std::is_same_v<Element, float16>)
    return ADAATTN_FLOAT16;
  else if constexpr (std::is_same_v<Element, bfloat16>)
    return ADAATTN_BFLOAT16;
  else {
    static_assert(std::is_same_v<Element, bool>, "elements are float, adaattn::float16, adaattn::bfloat16 or bool");
    return ADAATTN_BOOL;
  }
}

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete (memory, std::align_val_t{64}); }
};
using AlignedMemory = std::unique_ptr<void, AlignedDelete>;

inline AlignedMemory allocate(std::size_t bytes) {
  return AlignedMemory(::operator new (bytes == 0 ? 1 : bytes, std::align_val_t{64}));
}

}  // namespace detail

// A view of memory in [batch, heads, tokens, dim] order with any strides (in elements). Inputs may be const.
template <typename T>
Tensor view(T* data, std::array<std::int64_t, 4> shape, std::array<std::int64_t, 4> stride,
            adaattn_device device = ADAATTN_CPU) {
  Tensor tensor{};
  tensor.data = const_cast<std::remove_cv_t<T>*>(data);
  tensor.dtype = detail::dtype_of<T>();
  tensor.device = device;
  for (int axis = 0; axis < 4; ++axis) {
    tensor.shape[axis] = shape[axis];
    tensor.stride[axis] = stride[axis];
  }
  return tensor;
}

// The same for contiguous memory.
template <typename T>
Tensor view(T* data, std::array<std::int64_t, 4> shape, adaattn_device device = ADAATTN_CPU) {
  return view(data, shape, {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1}, device);
}

// q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv], out [B, Hq, Nq, Dv]; everything else at its default.
inline ForwardArgs forward_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
  ForwardArgs args{};
  args.q = q;
  args.k = k;
  args.v = v;
  args.out = out;
  args.options = adaattn_default_options();
  return args;
}

// Bytes of 64-byte aligned workspace that the call needs. Throws Error.
inline std::size_t forward_workspace(const ForwardArgs& args) {
  std::size_t bytes = 0;
  detail::check(adaattn_forward_workspace(&args, &bytes));
  return bytes;
}

inline std::size_t backward_workspace(const BackwardArgs& args) {
  std::size_t bytes = 0;
  detail::check(adaattn_backward_workspace(&args, &bytes));
  return bytes;
}

// out = softmax(scale q k^T + mask) v. With args.workspace NULL and CPU tensors, takes the workspace itself. Throws
// Error.
inline void forward(ForwardArgs args) {
  detail::AlignedMemory memory;
  if (args.workspace == nullptr && args.q.device == ADAATTN_CPU) {
    args.workspace_bytes = forward_workspace(args);
    memory = detail::allocate(args.workspace_bytes);
    args.workspace = memory.get();
  }
  detail::check(adaattn_forward(&args));
}

// dq, dk and dv from dout, a given out and its lse. Workspace as in forward. Throws Error.
inline void backward(BackwardArgs args) {
  detail::AlignedMemory memory;
  if (args.workspace == nullptr && args.q.device == ADAATTN_CPU) {
    args.workspace_bytes = backward_workspace(args);
    memory = detail::allocate(args.workspace_bytes);
    args.workspace = memory.get();
  }
  detail::check(adaattn_backward(&args));
}

// Attention over the union of disjoint key sets from attention over each, see adaattn_merge_args. Throws Error.
inline void merge(const MergeArgs& args) { detail::check(adaattn_merge(&args)); }

// Statistics of q, k, v and of the softmax, see adaattn_measure_args. With args.workspace NULL takes the workspace
// itself. Throws Error.
inline void measure(MeasureArgs args) {
  detail::AlignedMemory memory;
  if (args.workspace == nullptr) {
    detail::check(adaattn_measure_workspace(&args, &args.workspace_bytes));
    memory = detail::allocate(args.workspace_bytes);
    args.workspace = memory.get();
  }
  detail::check(adaattn_measure(&args));
}

// JSON: version, devices, instruction sets, kernels and why each is unavailable (or declines args). Throws Error.
inline std::string describe(const ForwardArgs* args = nullptr) {
  std::size_t needed = 0;
  detail::check(adaattn_describe(args, nullptr, 0, &needed));
  std::string text(needed, '\0');
  detail::check(adaattn_describe(args, text.data(), text.size(), nullptr));
  text.resize(needed - 1);
  return text;
}

}  // namespace adaattn
