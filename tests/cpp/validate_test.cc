// Every refusal of the C interface names the argument, what it was and what is allowed; none of them writes anything.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "adaattn/attention.h"
#include "cuda/cuda_kernels.h"

namespace adaattn {
namespace {

constexpr std::int64_t kB = 2, kHq = 4, kHk = 2, kNq = 3, kNk = 5, kD = 8;
constexpr float kUntouched = 777;

// A sound call of each kind, to be spoilt.
struct Call {
  std::vector<float> q = std::vector<float>(kB * kHq * kNq * kD, 0.5f),
                     k = std::vector<float>(kB * kHk * kNk * kD, 0.5f), v = k,
                     out = std::vector<float>(q.size(), kUntouched), mask = std::vector<float>(kNq * kNk),
                     lse = std::vector<float>(kB * kHq * kNq, kUntouched), dout = q, dq = out,
                     dk = std::vector<float>(k.size(), kUntouched), dv = dk;
  std::vector<std::int64_t> lengths = {5, 3};
  alignas(64) std::byte scratch[1 << 20];
  ForwardArgs forward{};
  BackwardArgs backward{};
  std::vector<Tensor> parts;
  std::vector<const float*> part_lses;
  MergeArgs merge{};

  Call() {
    const Tensor out_view = view(out.data(), {kB, kHq, kNq, kD});
    forward = forward_args(view(q.data(), {kB, kHq, kNq, kD}), view(k.data(), {kB, kHk, kNk, kD}),
                           view(v.data(), {kB, kHk, kNk, kD}), out_view);
    forward.mask = view(mask.data(), {1, 1, kNq, kNk});
    forward.key_lengths = lengths.data();
    forward.lse = lse.data();
    forward.workspace = scratch;
    forward.workspace_bytes = sizeof(scratch);
    backward.q = forward.q, backward.k = forward.k, backward.v = forward.v, backward.mask = forward.mask;
    backward.out = view(q.data(), {kB, kHq, kNq, kD});
    backward.dout = view(dout.data(), {kB, kHq, kNq, kD});
    backward.dq = view(dq.data(), {kB, kHq, kNq, kD});
    backward.dk = view(dk.data(), {kB, kHk, kNk, kD});
    backward.dv = view(dv.data(), {kB, kHk, kNk, kD});
    backward.lse = lse.data();
    backward.key_lengths = lengths.data();
    backward.options = forward.options;
    backward.workspace = scratch;
    backward.workspace_bytes = sizeof(scratch);
    parts = {forward.q, backward.dout};
    part_lses = {lse.data(), lse.data()};
    merge = {.parts = parts.data(),
             .part_lses = part_lses.data(),
             .count = 2,
             .out = out_view,
             .lse = nullptr,
             .num_threads = 0,
             .stream = nullptr};
  }
};

struct Refusal {
  const char* name;
  std::function<void(Call&)> spoil;
  std::vector<const char*> says;  // all of these, in the message
  adaattn_status status = ADAATTN_INVALID_ARGUMENT;
};

void PrintTo(const Refusal& refusal, std::ostream* stream) { *stream << refusal.name; }
std::string name_of(const ::testing::TestParamInfo<Refusal>& info) { return info.param.name; }

void expect_refused(const Refusal& refusal, adaattn_status status) {
  const std::string message = adaattn_last_error();
  EXPECT_EQ(status, refusal.status) << message;
  for (const char* part : refusal.says)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
}

void expect_untouched(const std::vector<float>& values) {
  for (const float value : values) ASSERT_EQ(value, kUntouched);
}

template <typename T>
T* misaligned(T* pointer) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) + 1);
}

class ForwardRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(ForwardRefusal, SaysWhy) {
  Call call;
  GetParam().spoil(call);
  expect_refused(GetParam(), adaattn_forward(&call.forward));
  expect_untouched(call.out);
  expect_untouched(call.lse);
  EXPECT_THROW(
      try { adaattn::forward(call.forward); } catch (const Error& error) {
        EXPECT_EQ(error.status(), GetParam().status);
        throw;
      },
      std::invalid_argument);
}

const double kNaN = std::numeric_limits<double>::quiet_NaN();
const double kInfinity = std::numeric_limits<double>::infinity();

// What forward and backward check alike. `a` is the forward or the backward arguments.
template <typename Args>
std::vector<Refusal> input_refusals(Args Call::*which) {
  const auto with = [which](auto change) { return [which, change](Call& call) { change(call.*which); }; };
  return {
      {"q_dtype_bool",
       with([](Args& a) { a.q.dtype = ADAATTN_BOOL; }),
       {"q.dtype is 3 (bool)", "float32, float16 or bfloat16"}},
      {"q_dtype_unknown", with([](Args& a) { a.q.dtype = -7; }), {"q.dtype is -7 (unknown)"}},
      {"k_dtype", with([](Args& a) { a.k.dtype = ADAATTN_FLOAT16; }), {"k.dtype is float16", "that of q, float32"}},
      {"v_dtype", with([](Args& a) { a.v.dtype = ADAATTN_BFLOAT16; }), {"v.dtype is bfloat16", "that of q, float32"}},
      {"q_device_unknown", with([](Args& a) { a.q.device = 9; }), {"q.device is 9", "0 (cpu) or 1 (cuda)"}},
      {"k_device", with([](Args& a) { a.k.device = ADAATTN_CUDA; }), {"k is on cuda", "where q is, on cpu"}},
      {"q_negative_shape", with([](Args& a) { a.q.shape[2] = -1; }), {"q.shape[2] (tokens) is -1", "must be >= 0"}},
      {"q_null", with([](Args& a) { a.q.data = nullptr; }), {"q.data is NULL", "[2, 4, 3, 8]"}},
      {"k_null", with([](Args& a) { a.k.data = nullptr; }), {"k.data is NULL"}},
      {"v_null", with([](Args& a) { a.v.data = nullptr; }), {"v.data is NULL"}},
      {"q_misaligned",
       with([](Args& a) { a.q.data = misaligned(static_cast<char*>(a.q.data)); }),
       {"q.data is misaligned", "multiple of 4 bytes", "float32"}},
      {"no_dim", with([](Args& a) { a.q.shape[3] = 0; }), {"q.shape is [2, 4, 3, 0]", "(D) must be >= 1"}},
      {"no_value_dim", with([](Args& a) { a.v.shape[3] = 0; }), {"v.shape is [2, 2, 5, 0]", "(Dv) must be >= 1"}},
      {"heads_do_not_divide", with([](Args& a) { a.k.shape[1] = 3; }), {"k has 3 heads, q has 4", "must divide"}},
      {"no_key_heads", with([](Args& a) { a.k.shape[1] = 0; }), {"k has 0 heads, q has 4"}},
      {"k_batch",
       with([](Args& a) { a.k.shape[0] = 1; }),
       {"k.shape is [1, 2, 5, 8]", "[B of q, Hk, Nk, D of q]", "[2, 2, 5, 8]"}},
      {"k_dim", with([](Args& a) { a.k.shape[3] = 7; }), {"k.shape is [2, 2, 5, 7]", "[2, 2, 5, 8]"}},
      {"v_tokens", with([](Args& a) { a.v.shape[2] = 4; }), {"v.shape is [2, 2, 4, 8]", "[2, 2, 5, 8]"}},
      {"v_heads", with([](Args& a) { a.v.shape[1] = 1; }), {"v.shape is [2, 1, 5, 8]", "[2, 2, 5, 8]"}},
      {"too_many_elements",
       with([](Args& a) { a.q.shape[0] = std::int64_t{1} << 50; }),
       {"q with shape", "is too large"}},
      {"product_overflows",
       with([](Args& a) { a.q.shape[0] = a.q.shape[1] = std::int64_t{1} << 40; }),
       {"is too large"}},
      {"stride_too_large", with([](Args& a) { a.q.stride[0] = std::int64_t{1} << 60; }), {"strides", "is too large"}},
      {"stride_least", with([](Args& a) { a.q.stride[3] = INT64_MIN; }), {"is too large"}},
      {"strides_overflow_together",
       with([](Args& a) { a.q.stride[0] = a.q.stride[1] = INT64_MAX / 4; }),
       {"is too large"}},
      {"error_negative", with([](Args& a) { a.options.error = -1e-3; }), {"options.error is -0.001", ">= 0"}},
      {"error_nan", with([](Args& a) { a.options.error = kNaN; }), {"options.error is nan"}},
      {"error_infinite", with([](Args& a) { a.options.error = kInfinity; }), {"options.error is inf", "finite"}},
      {"scale_nan",
       with([](Args& a) { a.options.has_scale = 1, a.options.scale = kNaN; }),
       {"options.scale is nan", "finite"}},
      {"scale_infinite",
       with([](Args& a) { a.options.has_scale = 1, a.options.scale = -kInfinity; }),
       {"options.scale is -inf"}},
      {"alignment",
       with([](Args& a) { a.options.alignment = 2; }),
       {"options.alignment is 2", "0 (top left) or 1 (bottom right)"}},
      {"window_left",
       with([](Args& a) { a.options.window_left = -2; }),
       {"options.window_left is -2", "-1 for no limit"}},
      {"window_right",
       with([](Args& a) { a.options.window_right = -5; }),
       {"options.window_right is -5", "-1 for no limit"}},
      {"sinks", with([](Args& a) { a.options.sinks = -1; }), {"options.sinks is -1", ">= 0"}},
      {"num_threads", with([](Args& a) { a.options.num_threads = -1; }), {"options.num_threads is -1", "0..1024"}},
      {"too_many_threads",
       with([](Args& a) { a.options.num_threads = 1025; }),
       {"options.num_threads is 1025", "0..1024"}},
      {"unknown_kernel",
       with([](Args& a) { a.options.kernel = "fastest"; }),
       {"options.kernel is \"fastest\"", "reference_fp64"}},
      {"mask_dtype",
       with([](Args& a) { a.mask.dtype = ADAATTN_FLOAT16; }),
       {"mask.dtype is float16", "bool, float32 or that of q"}},
      {"mask_device", with([](Args& a) { a.mask.device = ADAATTN_CUDA; }), {"mask is on cuda"}},
      {"mask_shape", with([](Args& a) { a.mask.shape[3] = 4; }), {"mask.shape is [1, 1, 3, 4]", "Nk or 1", "Nk = 5"}},
      {"mask_heads", with([](Args& a) { a.mask.shape[1] = 2; }), {"mask.shape is [1, 2, 3, 5]", "Hq = 4"}},
      {"mask_misaligned",
       with([](Args& a) { a.mask.data = misaligned(static_cast<char*>(a.mask.data)); }),
       {"mask.data is misaligned"}},
      {"key_length_too_long", [](Call& call) { call.lengths[1] = 6; }, {"key_lengths[1] is 6", "0..Nk = 5"}},
      {"key_length_negative", [](Call& call) { call.lengths[0] = -1; }, {"key_lengths[0] is -1"}},
      {"key_lengths_misaligned",
       with([](Args& a) { a.key_lengths = misaligned(a.key_lengths); }),
       {"key_lengths is misaligned"}},
      {"no_workspace",
       with([](Args& a) {
         a.workspace = nullptr;
         a.workspace_bytes = 1 << 20;
         a.options.kernel = "reference_fp64";
         a.q.device = a.q.device;
       }),
       {"workspace has 0 bytes, needs"},
       ADAATTN_WORKSPACE_TOO_SMALL},
      {"workspace_too_small",
       with([](Args& a) {
         a.workspace_bytes = 1;
         a.options.kernel = "reference_fp64";
       }),
       {"workspace has 1 bytes, needs"},
       ADAATTN_WORKSPACE_TOO_SMALL},
      {"workspace_misaligned",
       with([](Args& a) {
         a.workspace = static_cast<std::byte*>(a.workspace) + 32;
         a.options.kernel = "reference_fp64";
       }),
       {"workspace is misaligned", "64 bytes"}},
      {"cuda_without_kernels",
       with([](Args& a) {
         a.options.kernel = "reference_fp64";
         a.q.device = a.k.device = a.v.device = a.mask.device = ADAATTN_CUDA;
         if constexpr (std::is_same_v<Args, ForwardArgs>)
           a.out.device = ADAATTN_CUDA;
         else
           a.out.device = a.dout.device = a.dq.device = a.dk.device = a.dv.device = ADAATTN_CUDA;
       }),
       {"no kernel takes q [2, 4, 3, 8] float32 on cuda", "reference_fp64: takes cpu tensors only"},
       ADAATTN_UNSUPPORTED},
  };
}

std::vector<Refusal> forward_refusals() {
  std::vector<Refusal> all = input_refusals(&Call::forward);
  // The wrapper takes a workspace itself where there is none.
  std::erase_if(all, [](const Refusal& refusal) { return std::string(refusal.name) == "no_workspace"; });
  const std::vector<Refusal> own = {
      {"out_shape",
       [](Call& c) { c.forward.out.shape[2] = 2; },
       {"out.shape is [2, 4, 2, 8]", "[B, Hq, Nq, Dv] = [2, 4, 3, 8]"}},
      {"out_dtype", [](Call& c) { c.forward.out.dtype = ADAATTN_FLOAT16; }, {"out.dtype is float16"}},
      {"out_device", [](Call& c) { c.forward.out.device = ADAATTN_CUDA; }, {"out is on cuda"}},
      {"out_null", [](Call& c) { c.forward.out.data = nullptr; }, {"out.data is NULL"}},
      {"out_stride_zero",
       [](Call& c) { c.forward.out.stride[1] = 0; },
       {"out.stride[1] (heads) is 0", "its own place"}},
      {"lse_misaligned", [](Call& c) { c.forward.lse = misaligned(c.forward.lse); }, {"lse is misaligned", "4 bytes"}},
      {"entropy_misaligned", [](Call& c) { c.forward.entropy = misaligned(c.lse.data()); }, {"entropy is misaligned"}},
      {"max_probability_misaligned",
       [](Call& c) { c.forward.max_probability = misaligned(c.lse.data()); },
       {"max_probability is misaligned"}},
      {"tile_classes_on_cuda",
       [](Call& c) {
         static std::uint8_t classes[1];
         c.forward.tile_classes = classes;
         c.forward.mask = {};
         c.forward.q.device = c.forward.k.device = c.forward.v.device = c.forward.out.device = ADAATTN_CUDA;
       },
       {"tile_classes is given, but q is on cuda", "must be NULL"}},
  };
  all.insert(all.end(), own.begin(), own.end());
  return all;
}

INSTANTIATE_TEST_SUITE_P(Validate, ForwardRefusal, ::testing::ValuesIn(forward_refusals()), name_of);

class BackwardRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(BackwardRefusal, SaysWhy) {
  Call call;
  GetParam().spoil(call);
  expect_refused(GetParam(), adaattn_backward(&call.backward));
  expect_untouched(call.dq);
  expect_untouched(call.dk);
  expect_untouched(call.dv);
}

std::vector<Refusal> backward_refusals() {
  std::vector<Refusal> all = input_refusals(&Call::backward);
  const std::vector<Refusal> own = {
      {"out_shape", [](Call& c) { c.backward.out.shape[3] = 9; }, {"out.shape is [2, 4, 3, 9]"}},
      {"dout_shape", [](Call& c) { c.backward.dout.shape[0] = 1; }, {"dout.shape is [1, 4, 3, 8]"}},
      {"dout_dtype", [](Call& c) { c.backward.dout.dtype = ADAATTN_BFLOAT16; }, {"dout.dtype is bfloat16"}},
      {"dq_shape", [](Call& c) { c.backward.dq.shape[1] = 2; }, {"dq.shape is [2, 2, 3, 8]"}},
      {"dk_shape", [](Call& c) { c.backward.dk.shape[2] = 3; }, {"dk.shape is [2, 2, 3, 8]"}},
      {"dv_shape", [](Call& c) { c.backward.dv.shape[2] = 3; }, {"dv.shape is [2, 2, 3, 8]"}},
      {"dk_stride_zero", [](Call& c) { c.backward.dk.stride[2] = 0; }, {"dk.stride[2] (tokens) is 0"}},
      {"dv_null", [](Call& c) { c.backward.dv.data = nullptr; }, {"dv.data is NULL"}},
      {"lse_null", [](Call& c) { c.backward.lse = nullptr; }, {"lse is NULL"}},
      {"lse_misaligned", [](Call& c) { c.backward.lse = misaligned(c.backward.lse); }, {"lse is misaligned"}},
      {"plans_alone",
       [](Call& c) {
         static const adaattn_head_plan plans[8] = {};
         c.backward.plans = plans;
       },
       {"tile_classes is NULL, but plans is not"}},
      {"classes_alone",
       [](Call& c) {
         static const std::uint8_t classes[64] = {};
         c.backward.tile_classes = classes;
       },
       {"plans is NULL, but tile_classes is not"}},
  };
  all.insert(all.end(), own.begin(), own.end());
  return all;
}

INSTANTIATE_TEST_SUITE_P(Validate, BackwardRefusal, ::testing::ValuesIn(backward_refusals()), name_of);

class MergeRefusal : public ::testing::TestWithParam<Refusal> {};

TEST_P(MergeRefusal, SaysWhy) {
  Call call;
  GetParam().spoil(call);
  if (call.merge.out.device == ADAATTN_CUDA && cuda::unavailable_reason().empty())
    GTEST_SKIP() << "a device is here, and would be given the host's memory";
  expect_refused(GetParam(), adaattn_merge(&call.merge));
  expect_untouched(call.out);
}

INSTANTIATE_TEST_SUITE_P(
    Validate, MergeRefusal,
    ::testing::ValuesIn(std::vector<Refusal>{
        {"count", [](Call& c) { c.merge.count = 0; }, {"count is 0", ">= 1"}},
        {"parts_null", [](Call& c) { c.merge.parts = nullptr; }, {"parts is NULL"}},
        {"part_lses_null", [](Call& c) { c.merge.part_lses = nullptr; }, {"part_lses is NULL"}},
        {"part_lse_null", [](Call& c) { c.part_lses[1] = nullptr; }, {"part_lses[1] is NULL"}},
        {"part_lse_misaligned",
         [](Call& c) { c.part_lses[1] = misaligned(c.part_lses[1]); },
         {"part_lses[1] is misaligned"}},
        {"part_data_null", [](Call& c) { c.parts[1].data = nullptr; }, {"parts[1].data is NULL"}},
        {"part_dtype", [](Call& c) { c.parts[1].dtype = ADAATTN_FLOAT16; }, {"parts[1].dtype is float16"}},
        {"part_shape",
         [](Call& c) { c.parts[1].shape[2] = 2; },
         {"parts[1].shape is [2, 4, 2, 8]", "that of parts[0]"}},
        {"out_shape", [](Call& c) { c.merge.out.shape[3] = 4; }, {"out.shape is [2, 4, 3, 4]"}},
        {"out_stride_zero", [](Call& c) { c.merge.out.stride[0] = 0; }, {"out.stride[0] (batch) is 0"}},
        {"lse_misaligned", [](Call& c) { c.merge.lse = misaligned(c.lse.data()); }, {"lse is misaligned"}},
        {"num_threads", [](Call& c) { c.merge.num_threads = -3; }, {"num_threads is -3"}},
        {"cuda",
         [](Call& c) { c.parts[0].device = c.parts[1].device = c.merge.out.device = ADAATTN_CUDA; },
         {"parts are on cuda", "merge takes cpu tensors only"},
         ADAATTN_UNSUPPORTED},
    }),
    name_of);

TEST(Validate, NullPointersAreRefusedByEveryFunction) {
  std::size_t bytes = 0;
  double number = 0;
  char text[8];
  Call call;
  EXPECT_EQ(adaattn_forward(nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(adaattn_last_error(), "args is NULL");
  EXPECT_EQ(adaattn_backward(nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_merge(nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_forward_workspace(nullptr, &bytes), ADAATTN_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_forward_workspace(&call.forward, nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(adaattn_last_error(), "bytes is NULL");
  EXPECT_EQ(adaattn_backward_workspace(nullptr, &bytes), ADAATTN_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_reference_forward(nullptr, nullptr, nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_reference_backward(&call.backward, nullptr, &number, &number), ADAATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(adaattn_last_error(), "dq is NULL");
  EXPECT_EQ(adaattn_describe(nullptr, nullptr, sizeof(text), nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(adaattn_last_error(), "json is NULL");
}

TEST(Validate, SoundCallsPassAndClearTheLastError) {
  Call call;
  ASSERT_EQ(adaattn_forward(nullptr), ADAATTN_INVALID_ARGUMENT);
  EXPECT_EQ(adaattn_forward(&call.forward), ADAATTN_OK) << adaattn_last_error();
  EXPECT_STREQ(adaattn_last_error(), "");
  EXPECT_EQ(adaattn_backward(&call.backward), ADAATTN_OK) << adaattn_last_error();
  EXPECT_EQ(adaattn_merge(&call.merge), ADAATTN_OK) << adaattn_last_error();
}

TEST(Validate, ReferenceRefusesCudaTensors) {
  Call call;
  call.forward.q.device = call.forward.k.device = call.forward.v.device = ADAATTN_CUDA;
  call.forward.mask = {};
  call.forward.key_lengths = nullptr;
  EXPECT_EQ(adaattn_reference_forward(&call.forward, nullptr, nullptr), ADAATTN_UNSUPPORTED);
  EXPECT_STREQ(adaattn_last_error(), "the reference takes cpu tensors only, q is on cuda");
}

// A workspace query is asked before memory exists: only the shapes count.
TEST(Validate, WorkspaceNeedsNoPointers) {
  Call call;
  call.forward.q.data = call.forward.k.data = call.forward.v.data = call.forward.out.data = nullptr;
  EXPECT_NO_THROW(forward_workspace(call.forward));
  call.forward.k.shape[1] = 3;
  EXPECT_THROW(forward_workspace(call.forward), Error);
}

}  // namespace
}  // namespace adaattn
