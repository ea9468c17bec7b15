#include "dispatch/kernel_table.h"

#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/error.h"
#include "cpu/cpu_kernels.h"
#include "cuda/cuda_kernels.h"
#include "reference/reference_kernels.h"

namespace adaattn {
namespace {

template <typename K>
std::vector<K> join(std::initializer_list<std::span<const K>> lists) {
  std::vector<K> table;
  for (const auto list : lists) table.insert(table.end(), list.begin(), list.end());
  return table;
}

template <typename Args>
[[noreturn]] void refuse_all(std::span<const Kernel<Args>> table, const Args& args) {
  std::string text = concat("no kernel takes q [", args.q.shape[0], ", ", args.q.shape[1], ", ", args.q.shape[2], ", ",
                            args.q.shape[3], "] ", dtype_name(args.q.dtype), " on ", device_name(args.q.device));
  bool named = args.options.kernel == nullptr;
  for (const auto& kernel : table) {
    if (args.options.kernel != nullptr && std::strcmp(args.options.kernel, kernel.name) != 0) continue;
    named = true;
    text += concat("; ", kernel.name, ":");
    if (kernel.device != args.q.device) text += concat(" takes ", device_name(kernel.device), " tensors only,");
    for (const char* reason : kernel.unavailable()) text += concat(" ", reason, ",");
    for (const char* reason : kernel.declines(args)) text += concat(" ", reason, ",");
    text.pop_back();
  }
  if (!named) {
    text = concat("options.kernel is \"", args.options.kernel, "\", but the table has only");
    for (const auto& kernel : table) text += concat(" ", kernel.name);
    throw StatusError(ADAATTN_INVALID_ARGUMENT, text);
  }
  throw StatusError(ADAATTN_UNSUPPORTED, text);
}

template <typename Args>
const Kernel<Args>& choose_from(std::span<const Kernel<Args>> table, const Args& args) {
  for (const auto& kernel : table) {
    if (args.options.kernel != nullptr && std::strcmp(args.options.kernel, kernel.name) != 0) continue;
    if (kernel.device == args.q.device && kernel.unavailable().empty() && kernel.declines(args).empty()) return kernel;
  }
  refuse_all(table, args);
}

}  // namespace

std::span<const ForwardKernel> forward_kernels() {
  static const std::vector<ForwardKernel> table =
      join<ForwardKernel>({cuda::forward_kernels(), cpu::forward_kernels(), reference::forward_kernels()});
  return table;
}

std::span<const BackwardKernel> backward_kernels() {
  static const std::vector<BackwardKernel> table =
      join<BackwardKernel>({cuda::backward_kernels(), cpu::backward_kernels(), reference::backward_kernels()});
  return table;
}

const ForwardKernel& choose(const adaattn_forward_args& args) { return choose_from(forward_kernels(), args); }
const BackwardKernel& choose(const adaattn_backward_args& args) { return choose_from(backward_kernels(), args); }

}  // namespace adaattn
