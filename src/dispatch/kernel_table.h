// The implementation table: ordered candidates for each operation, the reference last. Each can say why it declines.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "adaattn/adaattn.h"

namespace adaattn {

// A short list of fixed sentences; building one allocates nothing.
class Reasons {
 public:
  Reasons& unless(bool condition, const char* reason) {
    if (!condition && count_ < reasons_.size()) reasons_[count_++] = reason;
    return *this;
  }
  bool empty() const { return count_ == 0; }
  const char* const* begin() const { return reasons_.data(); }
  const char* const* end() const { return reasons_.data() + count_; }

 private:
  std::array<const char*, 8> reasons_{};
  std::size_t count_ = 0;
};

// Args is adaattn_forward_args or adaattn_backward_args, already validated.
template <typename Args>
struct Kernel {
  const char* name;
  const char* summary;                    // one line for people
  adaattn_device device;                  // where the tensors live
  Reasons (*unavailable)();               // why this machine cannot run it
  Reasons (*declines)(const Args&);       // why it does not take this problem
  std::size_t (*workspace)(const Args&);  // bytes
  void (*run)(const Args&);
};

using ForwardKernel = Kernel<adaattn_forward_args>;
using BackwardKernel = Kernel<adaattn_backward_args>;

std::span<const ForwardKernel> forward_kernels();
std::span<const BackwardKernel> backward_kernels();

// The first kernel that takes the problem, honouring options.kernel; throws with every candidate's reasons if none.
const ForwardKernel& choose(const adaattn_forward_args& args);
const BackwardKernel& choose(const adaattn_backward_args& args);

}  // namespace adaattn
