#include "api/describe.h"

#include <string_view>
#include <type_traits>

#include "common/dtype.h"
#include "common/error.h"
#include "cpu/cpu_kernels.h"
#include "cuda/cuda_kernels.h"
#include "dispatch/kernel_table.h"

namespace adaattn {
namespace {

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + '"';
}

template <typename Range>
std::string array_of(const Range& texts) {
  std::string result = "[";
  for (const auto& text : texts) result += (result.size() > 1 ? ", " : "") + quoted(text);
  return result + "]";
}

template <typename Args>
std::string kernel_json(const Kernel<Args>& kernel, const char* operation, const Args* args) {
  std::string text = concat("{\"name\": ", quoted(kernel.name), ", \"operation\": \"", operation, "\", \"device\": \"",
                            device_name(kernel.device), "\", \"summary\": ", quoted(kernel.summary),
                            ", \"unavailable\": ", array_of(kernel.unavailable()));
  if (args != nullptr) {
    text += concat(", \"declines\": ", array_of(kernel.declines(*args)));
    text += concat(", \"takes_device\": ", kernel.device == args->q.device ? "true" : "false");
  }
  return text + "}";
}

}  // namespace

std::string describe_json(const adaattn_forward_args* args) {
  std::string kernels;
  for (const auto& kernel : forward_kernels())
    kernels += (kernels.empty() ? "" : ", ") + kernel_json(kernel, "forward", args);
  if (args == nullptr)
    for (const auto& kernel : backward_kernels())
      kernels += ", " + kernel_json<adaattn_backward_args>(kernel, "backward", nullptr);
  return concat("{\"version\": \"", ADAATTN_VERSION, "\", \"instruction_sets\": ", array_of(cpu::instruction_sets()),
                ", \"cuda_devices\": ", array_of(cuda::devices()),
                ", \"cuda_unavailable\": ", quoted(cuda::unavailable_reason()), ", \"kernels\": [", kernels, "]",
                args != nullptr ? concat(", \"chosen\": ", quoted(choose(*args).name)) : "", "}");
}

}  // namespace adaattn
