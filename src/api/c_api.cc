// The C interface: validate, choose from the table, run; exceptions become a status and a message.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <limits>
#include <string>

#include "adaattn/adaattn.h"
#include "api/describe.h"
#include "api/validate.h"
#include "common/error.h"
#include "cpu/merge.h"
#include "cpu/tiled.h"
#include "cuda/cuda_kernels.h"
#include "dispatch/kernel_table.h"
#include "measure/measure.h"
#include "plan/ladder.h"
#include "reference/reference.h"

namespace adaattn {
namespace {

thread_local std::string last_error;

template <typename Body>
adaattn_status guarded(Body&& body) {
  try {
    last_error.clear();
    body();
    return ADAATTN_OK;
  } catch (const StatusError& error) {
    last_error = error.what();
    return error.status();
  } catch (const std::exception& error) {
    last_error = concat("internal error: ", error.what());
    return ADAATTN_INTERNAL_ERROR;
  }
}

template <typename T>
const T& required(const T* pointer, const char* name) {
  if (pointer == nullptr) refuse(name, " is NULL");
  return *pointer;
}

template <typename Args>
adaattn_status workspace(const Args* args, std::size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    validate(required(args, "args"), Need::kShapesOnly);
    *bytes = choose(*args).workspace(*args);
  });
}

// Of exact kernels: CPUs multiply in float32, matrix units of GPUs in the inputs' type.
adaattn_precision exact_precision(const adaattn_tensor& q) {
  if (q.device == ADAATTN_CPU || q.dtype == ADAATTN_FLOAT32) return ADAATTN_PRECISION_FLOAT32;
  return q.dtype == ADAATTN_FLOAT16 ? ADAATTN_PRECISION_FLOAT16 : ADAATTN_PRECISION_BFLOAT16;
}

// What the kernels of a budget overwrite.
void report_dense(const adaattn_forward_args& args) {
  adaattn_head_report dense{};
  dense.plan = dense_plan(exact_precision(args.q));
  dense.error_bound = std::numeric_limits<double>::infinity();
  dense.work = 1;
  const double unasked = std::numeric_limits<double>::quiet_NaN();
  dense.summarised_mass = args.summarised_mass != nullptr ? 0 : unasked;
  dense.omitted_mass = args.omitted_mass != nullptr ? 0 : unasked;
  dense.accounted_error = args.summarised_mass != nullptr || args.omitted_mass != nullptr ? 0 : unasked;
  const std::int64_t heads = args.q.shape[0] * args.q.shape[1];
  if (args.heads != nullptr) std::fill_n(args.heads, heads, dense);
  if (args.tile_classes != nullptr)
    std::fill_n(args.tile_classes, heads * cpu::tile_class_count(args), std::uint8_t{ADAATTN_TILE_HIGH});
  if (args.times != nullptr) *args.times = {};
  for (float* masses : {args.summarised_mass, args.omitted_mass})
    if (masses != nullptr) std::fill_n(masses, heads * args.q.shape[2], 0.0F);
}
void report_dense(const adaattn_backward_args&) {}

// Kernels that have no stages count as attend. What a GPU takes is not known when the call returns.
void complete_times(const adaattn_forward_args& args, double seconds) {
  if (args.times == nullptr) return;
  adaattn_stage_times& times = *args.times;
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  if (args.q.device != ADAATTN_CPU)
    times = {.measure = kUnknown, .plan = kUnknown, .attend = kUnknown, .verify = kUnknown};
  else if (times.measure + times.plan + times.attend + times.verify == 0)
    times.attend = seconds;
}
void complete_times(const adaattn_backward_args&, double) {}

template <typename Args>
adaattn_status run(const Args* args) {
  return guarded([&] {
    validate(required(args, "args"), Need::kAll);
    const auto& kernel = choose(*args);
    validate_workspace(args->workspace, args->workspace_bytes, kernel.workspace(*args));
    report_dense(*args);
    const auto start = std::chrono::steady_clock::now();
    kernel.run(*args);
    complete_times(*args, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  });
}

// A v that is not there gets the shape of k, so that no size of it is left unchecked.
adaattn_measure_args with_values(const adaattn_measure_args& args) {
  adaattn_measure_args result = args;
  if (args.v.data != nullptr) return result;
  result.v = args.k;
  result.v.data = nullptr;
  return result;
}

template <typename Args>
void require_cpu(const Args& args) {
  if (args.q.device != ADAATTN_CPU)
    throw StatusError(ADAATTN_UNSUPPORTED, "the reference takes cpu tensors only, q is on cuda");
}

}  // namespace
}  // namespace adaattn

using namespace adaattn;

extern "C" {

uint32_t adaattn_abi_version(void) { return ADAATTN_ABI_VERSION; }
const char* adaattn_version(void) { return ADAATTN_VERSION; }
int32_t adaattn_panel_rows(void) { return static_cast<int32_t>(cpu::panel_rows()); }
const char* adaattn_last_error(void) { return last_error.c_str(); }

adaattn_options adaattn_default_options(void) {
  adaattn_options options{};
  options.window_left = -1;
  options.window_right = -1;
  return options;
}

adaattn_status adaattn_forward_workspace(const adaattn_forward_args* args, size_t* bytes) {
  return workspace(args, bytes);
}
adaattn_status adaattn_backward_workspace(const adaattn_backward_args* args, size_t* bytes) {
  return workspace(args, bytes);
}

adaattn_status adaattn_forward(const adaattn_forward_args* args) { return run(args); }
adaattn_status adaattn_backward(const adaattn_backward_args* args) { return run(args); }

adaattn_status adaattn_merge(const adaattn_merge_args* args) {
  return guarded([&] {
    validate(required(args, "args"));
    args->out.device == ADAATTN_CUDA ? cuda::merge(*args) : cpu::merge(*args);
  });
}

adaattn_status adaattn_measure_workspace(const adaattn_measure_args* args, size_t* bytes) {
  return guarded([&] {
    required(bytes, "bytes");
    validate(required(args, "args"), Need::kShapesOnly);
    *bytes = measure::workspace_bytes(with_values(*args));
  });
}

adaattn_status adaattn_measure(const adaattn_measure_args* args) {
  return guarded([&] {
    validate(required(args, "args"), Need::kAll);
    const adaattn_measure_args call = with_values(*args);
    validate_workspace(call.workspace, call.workspace_bytes, measure::workspace_bytes(call));
    measure::run(call);
  });
}

adaattn_status adaattn_reference_forward(const adaattn_forward_args* args, double* out, double* lse) {
  return guarded([&] {
    validate(required(args, "args"), Need::kInputs);
    require_cpu(*args);
    reference::forward(*args, out, lse);
  });
}

adaattn_status adaattn_reference_backward(const adaattn_backward_args* args, double* dq, double* dk, double* dv) {
  return guarded([&] {
    validate(required(args, "args"), Need::kInputs);
    require_cpu(*args);
    required(dq, "dq"), required(dk, "dk"), required(dv, "dv");
    reference::backward(*args, dq, dk, dv);
  });
}

adaattn_status adaattn_describe(const adaattn_forward_args* args, char* json, size_t capacity, size_t* needed) {
  return guarded([&] {
    if (args != nullptr) validate(*args, Need::kShapesOnly);
    const std::string text = describe_json(args);
    if (needed != nullptr) *needed = text.size() + 1;
    if (capacity == 0) return;
    required(json, "json");
    const std::size_t length = std::min(capacity - 1, text.size());
    std::memcpy(json, text.data(), length);
    json[length] = '\0';
  });
}

}  // extern "C"
