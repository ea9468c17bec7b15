#include "api/validate.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "common/dtype.h"
#include "common/error.h"
#include "common/scratch.h"

namespace adaattn {
namespace {

constexpr std::array kAxes = {"batch", "heads", "tokens", "dim"};

std::string shape_text(const adaattn_tensor& t) {
  return concat("[", t.shape[0], ", ", t.shape[1], ", ", t.shape[2], ", ", t.shape[3], "]");
}

bool aligned(const void* data, std::int64_t to) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(to) == 0;
}

bool has_elements(const adaattn_tensor& t) {
  return t.shape[0] != 0 && t.shape[1] != 0 && t.shape[2] != 0 && t.shape[3] != 0;
}

// Kernels compute sizes and byte offsets in 64 bits without checking again. 2^42 elements (dimensions of 0 count as 1,
// for they multiply other tensors' sizes) leave room for workspaces of a padded float32 copy per thread.
void check_extent(const char* name, const adaattn_tensor& t) {
  std::int64_t count = 1, reach = 0;
  bool overflow = false;
  for (int axis = 0; axis < 4; ++axis) {
    if (t.shape[axis] < 0) refuse(name, ".shape[", axis, "] (", kAxes[axis], ") is ", t.shape[axis], ", must be >= 0");
    std::int64_t step = 0;
    overflow |= __builtin_mul_overflow(count, std::max<std::int64_t>(t.shape[axis], 1), &count);
    overflow |= t.stride[axis] == INT64_MIN;
    overflow = overflow ||
               __builtin_mul_overflow(std::abs(t.stride[axis]), std::max<std::int64_t>(t.shape[axis] - 1, 0), &step);
    overflow = overflow || __builtin_add_overflow(reach, step, &reach);
  }
  constexpr std::int64_t kMostElements = std::int64_t{1} << 42, kMostOffset = std::int64_t{1} << 60;
  if (overflow || count > kMostElements || reach > kMostOffset)
    refuse(name, " with shape ", shape_text(t), " and strides [", t.stride[0], ", ", t.stride[1], ", ", t.stride[2],
           ", ", t.stride[3], "] is too large: at most 2^42 elements, and offsets of at most 2^60 elements");
}

void check_dtype_and_device(const char* name, const adaattn_tensor& t) {
  if (t.dtype != ADAATTN_FLOAT32 && t.dtype != ADAATTN_FLOAT16 && t.dtype != ADAATTN_BFLOAT16)
    refuse(name, ".dtype is ", t.dtype, " (", dtype_name(t.dtype), "), must be float32, float16 or bfloat16");
  if (t.device != ADAATTN_CPU && t.device != ADAATTN_CUDA)
    refuse(name, ".device is ", t.device, ", must be 0 (cpu) or 1 (cuda)");
}

void check_data(const char* name, const adaattn_tensor& t) {
  if (!has_elements(t)) return;
  if (t.data == nullptr) refuse(name, ".data is NULL, but its shape ", shape_text(t), " has elements");
  if (!aligned(t.data, dtype_size(t.dtype)))
    refuse(name, ".data is misaligned: address ", t.data, " is not a multiple of ", dtype_size(t.dtype),
           " bytes, the size of ", dtype_name(t.dtype));
}

// A written tensor must not have two indices on one element; a stride of 0 is the way that happens in practice.
void check_writable(const char* name, const adaattn_tensor& t) {
  if (!has_elements(t)) return;
  for (int axis = 0; axis < 4; ++axis)
    if (t.stride[axis] == 0 && t.shape[axis] > 1)
      refuse(name, ".stride[", axis, "] (", kAxes[axis], ") is 0, but it is written and has ", t.shape[axis],
             " entries there: every element needs its own place");
}

void check_array(const char* name, const void* data, std::int64_t element_bytes) {
  if (!aligned(data, element_bytes))
    refuse(name, " is misaligned: address ", data, " is not a multiple of ", element_bytes, " bytes");
}

void check_like(const char* name, const adaattn_tensor& t, const adaattn_tensor& q) {
  if (t.dtype != q.dtype) refuse(name, ".dtype is ", dtype_name(t.dtype), ", must be that of q, ", dtype_name(q.dtype));
  if (t.device != q.device)
    refuse(name, " is on ", device_name(t.device), ", must be where q is, on ", device_name(q.device));
}

void check_shape(const char* name, const adaattn_tensor& t, std::array<std::int64_t, 4> want, const char* meaning) {
  for (int axis = 0; axis < 4; ++axis)
    if (t.shape[axis] != want[axis])
      refuse(name, ".shape is ", shape_text(t), ", must be ", meaning, " = [", want[0], ", ", want[1], ", ", want[2],
             ", ", want[3], "]");
}

void check_tensor(const char* name, const adaattn_tensor& t, Need need) {
  check_dtype_and_device(name, t);
  check_extent(name, t);
  if (need != Need::kShapesOnly) check_data(name, t);
}

void check_output(const char* name, const adaattn_tensor& t, const adaattn_tensor& q, std::array<std::int64_t, 4> want,
                  const char* meaning, Need need) {
  check_tensor(name, t, need);
  check_like(name, t, q);
  check_shape(name, t, want, meaning);
  check_writable(name, t);
}

// OpenMP runtimes end the process when they cannot have as many threads as they are asked for.
void check_threads(const char* name, std::int32_t count) {
  constexpr std::int32_t kMostThreads = 1024;
  if (count < 0 || count > kMostThreads)
    refuse(name, " is ", count, ", must be in 0..", kMostThreads, " (0: OpenMP's default)");
}

void check_options(const adaattn_options& o) {
  if (!(o.error >= 0) || std::isinf(o.error))
    refuse("options.error is ", o.error, ", must be a finite number >= 0 (0 is exact)");
  if (o.has_scale != 0 && !std::isfinite(o.scale)) refuse("options.scale is ", o.scale, ", must be finite");
  if (o.alignment != ADAATTN_TOP_LEFT && o.alignment != ADAATTN_BOTTOM_RIGHT)
    refuse("options.alignment is ", o.alignment, ", must be 0 (top left) or 1 (bottom right)");
  if (o.window_left < -1) refuse("options.window_left is ", o.window_left, ", must be >= 0, or -1 for no limit");
  if (o.window_right < -1) refuse("options.window_right is ", o.window_right, ", must be >= 0, or -1 for no limit");
  if (o.sinks < 0) refuse("options.sinks is ", o.sinks, ", must be >= 0");
  if (o.guarantee != ADAATTN_MEASURED && o.guarantee != ADAATTN_BOUNDED)
    refuse("options.guarantee is ", o.guarantee, ", must be 0 (measured) or 1 (bounded)");
  check_threads("options.num_threads", o.num_threads);
}

void check_mask(const adaattn_tensor& mask, const adaattn_tensor& q, const adaattn_tensor& k, Need need) {
  if (mask.data == nullptr) return;
  if (mask.dtype != ADAATTN_BOOL && mask.dtype != ADAATTN_FLOAT32 && mask.dtype != q.dtype)
    refuse("mask.dtype is ", dtype_name(mask.dtype), ", must be bool, float32 or that of q, ", dtype_name(q.dtype));
  if (mask.device != q.device)
    refuse("mask is on ", device_name(mask.device), ", must be where q is, on ", device_name(q.device));
  check_extent("mask", mask);
  if (need != Need::kShapesOnly) check_data("mask", mask);
  const std::array<std::int64_t, 4> full = {q.shape[0], q.shape[1], q.shape[2], k.shape[2]};
  for (int axis = 0; axis < 4; ++axis)
    if (mask.shape[axis] != 1 && mask.shape[axis] != full[axis])
      refuse("mask.shape is ", shape_text(mask), ", must be [B or 1, Hq or 1, Nq or 1, Nk or 1] with B = ", full[0],
             ", Hq = ", full[1], ", Nq = ", full[2], ", Nk = ", full[3]);
}

// What forward and backward share: q, k, v, mask, key lengths and options.
template <typename Args>
void check_inputs(const Args& args, Need need) {
  const adaattn_tensor &q = args.q, &k = args.k, &v = args.v;
  check_tensor("q", q, need);
  check_tensor("k", k, need);
  check_tensor("v", v, need);
  check_like("k", k, q);
  check_like("v", v, q);
  if (q.shape[3] < 1) refuse("q.shape is ", shape_text(q), ", the last dimension (D) must be >= 1");
  if (v.shape[3] < 1) refuse("v.shape is ", shape_text(v), ", the last dimension (Dv) must be >= 1");
  if (k.shape[1] < 1 || q.shape[1] % k.shape[1] != 0)
    if (q.shape[1] != 0 || k.shape[1] != 0)
      refuse("k has ", k.shape[1], " heads, q has ", q.shape[1], ": the heads of k must divide those of q");
  check_shape("k", k, {q.shape[0], k.shape[1], k.shape[2], q.shape[3]}, "[B of q, Hk, Nk, D of q]");
  check_shape("v", v, {q.shape[0], k.shape[1], k.shape[2], v.shape[3]}, "[B of q, Hk of k, Nk of k, Dv]");
  check_options(args.options);
  check_mask(args.mask, q, k, need);
  if (need == Need::kShapesOnly || args.key_lengths == nullptr) return;
  check_array("key_lengths", args.key_lengths, 8);
  if (q.device != ADAATTN_CPU) return;  // a device pointer: kernels clamp it
  for (std::int64_t b = 0; b < q.shape[0]; ++b)
    if (args.key_lengths[b] < 0 || args.key_lengths[b] > k.shape[2])
      refuse("key_lengths[", b, "] is ", args.key_lengths[b], ", must be in 0..Nk = ", k.shape[2]);
}

}  // namespace

namespace {

// What no kernel could carry out; what this machine's kernels cannot is for them to say.
void check_plan(std::int64_t index, const adaattn_head_plan& plan) {
  const auto check = [&](bool fine, const char* field, auto value, const char* allowed) {
    if (!fine) refuse("plans[", index, "].", field, " is ", value, ", must be ", allowed);
  };
  check(plan.form >= ADAATTN_AUTOMATIC && plan.form <= ADAATTN_LOW_RANK, "form", plan.form, "-1..2 (adaattn_form)");
  if (plan.form == ADAATTN_AUTOMATIC) return;
  const auto is_precision = [](std::int32_t p) {
    return p >= ADAATTN_PRECISION_FLOAT32 && p <= ADAATTN_PRECISION_FLOAT8;
  };
  check(is_precision(plan.precision), "precision", plan.precision, "0..4 (adaattn_precision)");
  check(is_precision(plan.low_precision), "low_precision", plan.low_precision, "0..4 (adaattn_precision)");
  check(plan.pooled == 0 || plan.pooled == 1, "pooled", plan.pooled, "0 or 1");
  check(plan.form == ADAATTN_LOW_RANK ? plan.rank >= 1 : plan.rank >= 0, "rank", plan.rank,
        ">= 0, for low-rank heads >= 1");
  check(plan.screen <= 0, "screen", plan.screen, "<= 0 (the logarithm of a share), or -infinity");
  check(plan.low <= 0, "low", plan.low, "<= 0 (the logarithm of a share), or -infinity");
  check(plan.drop >= 0 && plan.drop <= 1, "drop", plan.drop, "in 0..1");
}

}  // namespace

void validate(const adaattn_forward_args& args, Need need) {
  check_inputs(args, need);
  if (need == Need::kInputs) return;
  check_output("out", args.out, args.q, {args.q.shape[0], args.q.shape[1], args.q.shape[2], args.v.shape[3]},
               "[B, Hq, Nq, Dv]", need);
  check_array("lse", args.lse, 4);
  check_array("entropy", args.entropy, 4);
  check_array("max_probability", args.max_probability, 4);
  check_array("heads", args.heads, alignof(adaattn_head_report));
  check_array("plans", args.plans, alignof(adaattn_head_plan));
  if (args.plans != nullptr && args.options.error == 0)
    refuse("plans are given, but options.error is 0: only a budget leaves a choice of plans");
  for (std::int64_t h = 0; args.plans != nullptr && h < args.q.shape[0] * args.q.shape[1]; ++h)
    check_plan(h, args.plans[h]);
  check_array("times", args.times, alignof(adaattn_stage_times));
  check_array("summarised_mass", args.summarised_mass, 4);
  check_array("omitted_mass", args.omitted_mass, 4);
  if (args.q.device != ADAATTN_CPU && args.tile_classes != nullptr)
    refuse("tile_classes is given, but q is on cuda: must be NULL there, only kernels for CPUs tell them");
  if (args.q.device != ADAATTN_CPU && (args.summarised_mass != nullptr || args.omitted_mass != nullptr))
    refuse(args.summarised_mass != nullptr ? "summarised_mass" : "omitted_mass",
           " is given, but q is on cuda: must be NULL there, only kernels for CPUs account for masses");
}

void validate(const adaattn_backward_args& args, Need need) {
  check_inputs(args, need);
  const adaattn_tensor &q = args.q, &k = args.k, &v = args.v;
  const std::array<std::int64_t, 4> out = {q.shape[0], q.shape[1], q.shape[2], v.shape[3]};
  check_tensor("dout", args.dout, need);
  check_like("dout", args.dout, q);
  check_shape("dout", args.dout, out, "[B, Hq, Nq, Dv]");
  if (need == Need::kInputs) return;
  check_tensor("out", args.out, need);
  check_like("out", args.out, q);
  check_shape("out", args.out, out, "[B, Hq, Nq, Dv]");
  if ((args.plans == nullptr) != (args.tile_classes == nullptr))
    refuse(args.plans == nullptr ? "plans" : "tile_classes", " is NULL, but ",
           args.plans == nullptr ? "tile_classes" : "plans",
           " is not: the gradient of a forward pass within a budget needs both");
  check_output("dq", args.dq, q, {q.shape[0], q.shape[1], q.shape[2], q.shape[3]}, "that of q", need);
  check_output("dk", args.dk, q, {k.shape[0], k.shape[1], k.shape[2], k.shape[3]}, "that of k", need);
  check_output("dv", args.dv, q, {v.shape[0], v.shape[1], v.shape[2], v.shape[3]}, "that of v", need);
  if (need == Need::kShapesOnly) return;
  if (args.lse == nullptr && out[0] * out[1] * out[2] != 0) refuse("lse is NULL, must be [B, Hq, Nq] float32");
  check_array("lse", args.lse, 4);
  check_array("plans", args.plans, alignof(adaattn_head_plan));
}

void validate(const adaattn_merge_args& args) {
  if (args.count < 1) refuse("count is ", args.count, ", must be >= 1");
  if (args.parts == nullptr) refuse("parts is NULL");
  if (args.part_lses == nullptr) refuse("part_lses is NULL");
  check_threads("num_threads", args.num_threads);
  const adaattn_tensor& first = args.parts[0];
  for (std::int64_t i = 0; i < args.count; ++i) {
    const std::string name = concat("parts[", i, "]");
    check_tensor(name.c_str(), args.parts[i], Need::kAll);
    check_like(name.c_str(), args.parts[i], first);
    check_shape(name.c_str(), args.parts[i], {first.shape[0], first.shape[1], first.shape[2], first.shape[3]},
                "that of parts[0]");
    // Read row by row, also where rows are empty.
    if (args.part_lses[i] == nullptr && first.shape[0] != 0 && first.shape[1] != 0 && first.shape[2] != 0)
      refuse("part_lses[", i, "] is NULL");
    check_array(concat("part_lses[", i, "]").c_str(), args.part_lses[i], 4);
  }
  check_output("out", args.out, first, {first.shape[0], first.shape[1], first.shape[2], first.shape[3]},
               "that of parts[0]", Need::kAll);
  check_array("lse", args.lse, 4);
}

void validate(const adaattn_measure_args& args, Need need) {
  adaattn_measure_args checked = args;
  if (args.v.data == nullptr) checked.v = args.k;  // no values
  check_inputs(checked, need);
  constexpr std::uint32_t kAll = (1U << ADAATTN_STATISTIC_COUNT) - 1;
  if (args.statistics == 0 || (args.statistics & ~kAll) != 0)
    refuse("statistics is ", args.statistics, ", must be a sum of adaattn_statistic, 1..", kAll);
  if (args.sample_rows < 1 || args.sample_rows > 4096)
    refuse("sample_rows is ", args.sample_rows, ", must be in 1..4096");
  // Threads hold the scores of their sampled rows; see check_extent.
  constexpr std::int64_t kMostScores = std::int64_t{1} << 42;
  if (args.k.shape[2] > kMostScores / std::max<std::int64_t>(args.sample_rows, 32))
    refuse("k has ", args.k.shape[2], " tokens and sample_rows is ", args.sample_rows,
           ": too large, at most 2^42 sampled scores");
  if (args.sketch < 0 || args.sketch > 1024) refuse("sketch is ", args.sketch, ", must be in 0..1024 (0: none)");
  if (args.power_iterations < 0 || args.power_iterations > 16)
    refuse("power_iterations is ", args.power_iterations, ", must be in 0..16");
  if (args.q.device != ADAATTN_CPU)
    throw StatusError(ADAATTN_UNSUPPORTED,
                      concat("q is on ", device_name(args.q.device), ", measure takes cpu tensors only"));
  if (need == Need::kShapesOnly || args.q.shape[0] * args.q.shape[1] == 0) return;
  if (args.heads == nullptr) refuse("heads is NULL, must be [B, Hq] adaattn_head_statistics");
  check_array("heads", args.heads, alignof(adaattn_head_statistics));
  const struct {
    const char* name;
    const double* data;
    std::uint32_t statistic;
    const char* meaning;
  } outputs[] = {{"gram_q", args.gram_q, ADAATTN_STATISTIC_SCORE_SPECTRUM, "[B, Hq, D, D]"},
                 {"gram_k", args.gram_k, ADAATTN_STATISTIC_SCORE_SPECTRUM, "[B, Hk, D, D]"},
                 {"softmax_core", args.softmax_core, ADAATTN_STATISTIC_SOFTMAX_SPECTRUM, "[B, Hq, S, S]"}};
  for (const auto& output : outputs) {
    if ((args.statistics & output.statistic) == 0) continue;
    if (output.data == nullptr)
      refuse(output.name, " is NULL, must be ", output.meaning, " float64 with statistics ", args.statistics);
    check_array(output.name, output.data, alignof(double));
  }
}

void validate_workspace(const void* workspace, std::size_t bytes, std::size_t needed) {
  if (needed == 0) return;
  if (workspace == nullptr || bytes < needed)
    throw StatusError(ADAATTN_WORKSPACE_TOO_SMALL,
                      concat("workspace has ", workspace == nullptr ? 0 : bytes, " bytes, needs ", needed,
                             " (ask the matching *_workspace function)"));
  if (!aligned(workspace, Scratch::kAlignment))
    refuse("workspace is misaligned: address ", workspace, " is not a multiple of ", Scratch::kAlignment, " bytes");
}

}  // namespace adaattn
