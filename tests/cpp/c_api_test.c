/* The C interface from C99: what it computes, refuses and reports, through the shared library's visible symbols. */
#include <adaattn/adaattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int passed = 0, failed = 0;

#define CHECK(condition)                                                                            \
  do {                                                                                              \
    if (condition) {                                                                                \
      ++passed;                                                                                     \
    } else {                                                                                        \
      ++failed;                                                                                     \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, adaattn_last_error()); \
    }                                                                                               \
  } while (0)

enum { kTokens = 4, kDim = 2 };

static float q[kTokens * kDim], k[kTokens * kDim], v[kTokens * kDim], out[kTokens * kDim];
static float dout[kTokens * kDim], dq[kTokens * kDim], dk[kTokens * kDim], dv[kTokens * kDim], lse[kTokens];

static adaattn_tensor tensor(float* data) {
  adaattn_tensor t;
  memset(&t, 0, sizeof(t));
  t.data = data;
  t.dtype = ADAATTN_FLOAT32;
  t.device = ADAATTN_CPU;
  t.shape[0] = t.shape[1] = 1;
  t.shape[2] = kTokens;
  t.shape[3] = kDim;
  t.stride[0] = t.stride[1] = kTokens * kDim;
  t.stride[2] = kDim;
  t.stride[3] = 1;
  return t;
}

/* 64-byte aligned; what *to_free points to afterwards is to be freed. */
static void* aligned_memory(size_t bytes, void** to_free) {
  *to_free = malloc(bytes + 64);
  return (void*)(((uintptr_t)*to_free + 63) / 64 * 64);
}

static void test_defaults(void) {
  const adaattn_options options = adaattn_default_options();
  CHECK(options.error == 0);
  CHECK(options.has_scale == 0);
  CHECK(options.causal == 0);
  CHECK(options.alignment == ADAATTN_TOP_LEFT);
  CHECK(options.window_left == -1 && options.window_right == -1 && options.sinks == 0);
  CHECK(options.num_threads == 0);
  CHECK(options.kernel == NULL);
  CHECK(adaattn_abi_version() == ADAATTN_ABI_VERSION);
  CHECK(strlen(adaattn_version()) >= 5);
}

/* Uniform causal attention: the mean of the values so far, and gradients that follow from it. */
static void test_forward_and_backward(void) {
  adaattn_forward_args forward;
  adaattn_backward_args backward;
  size_t bytes = 0;
  void* to_free;
  int i;
  for (i = 0; i < kTokens * kDim; ++i) {
    q[i] = 0;
    k[i] = (float)i;
    v[i] = (float)(i / kDim); /* the key's number */
    dout[i] = 1;
  }
  memset(&forward, 0, sizeof(forward));
  forward.q = tensor(q), forward.k = tensor(k), forward.v = tensor(v), forward.out = tensor(out);
  forward.lse = lse;
  forward.options = adaattn_default_options();
  forward.options.causal = 1;
  CHECK(adaattn_forward_workspace(&forward, &bytes) == ADAATTN_OK);
  forward.workspace = aligned_memory(bytes, &to_free);
  forward.workspace_bytes = bytes;
  CHECK(adaattn_forward(&forward) == ADAATTN_OK);
  CHECK(strcmp(adaattn_last_error(), "") == 0);
  free(to_free);
  for (i = 0; i < kTokens; ++i) {
    CHECK(fabsf(out[i * kDim] - 0.5f * (float)i) < 1e-6f);
    CHECK(fabsf(lse[i] - logf((float)(i + 1))) < 1e-6f);
  }

  memset(&backward, 0, sizeof(backward));
  backward.q = forward.q, backward.k = forward.k, backward.v = forward.v, backward.out = forward.out;
  backward.dout = tensor(dout), backward.dq = tensor(dq), backward.dk = tensor(dk), backward.dv = tensor(dv);
  backward.lse = lse;
  backward.options = forward.options;
  CHECK(adaattn_backward_workspace(&backward, &bytes) == ADAATTN_OK);
  backward.workspace = aligned_memory(bytes, &to_free);
  backward.workspace_bytes = bytes;
  CHECK(adaattn_backward(&backward) == ADAATTN_OK);
  free(to_free);
  /* Key j is read by queries j..3 with weights 1/(j+1)..1/4; q = 0 leaves no gradient to k. */
  CHECK(fabsf(dv[0] - (1 + 1.0f / 2 + 1.0f / 3 + 1.0f / 4)) < 1e-6f);
  CHECK(fabsf(dv[3 * kDim] - 1.0f / 4) < 1e-6f);
  for (i = 0; i < kTokens * kDim; ++i) CHECK(dk[i] == 0);
  CHECK(dq[0] == 0);                            /* query 0 sees one key: nothing to choose */
  CHECK(fabsf(dq[kDim] - 0.70710678f) < 1e-5f); /* 2 keys: 2 channels * cov(v, k) / sqrt(2) = 2 * 0.5 / sqrt(2) */
}

static void test_refusals(void) {
  adaattn_forward_args args;
  size_t bytes = 0;
  CHECK(adaattn_forward(NULL) == ADAATTN_INVALID_ARGUMENT);
  CHECK(strcmp(adaattn_last_error(), "args is NULL") == 0);
  memset(&args, 0, sizeof(args)); /* all zeros is no call: D is 0 */
  args.options = adaattn_default_options();
  CHECK(adaattn_forward_workspace(&args, &bytes) == ADAATTN_INVALID_ARGUMENT);
  CHECK(strstr(adaattn_last_error(), "q.shape") != NULL);
}

static void test_merge_and_reference(void) {
  adaattn_forward_args args;
  adaattn_merge_args merge;
  adaattn_tensor parts[2];
  const float* lses[2];
  double out64[kTokens * kDim], lse64[kTokens];
  memset(&args, 0, sizeof(args));
  args.q = tensor(q), args.k = tensor(k), args.v = tensor(v);
  args.options = adaattn_default_options();
  CHECK(adaattn_reference_forward(&args, out64, lse64) == ADAATTN_OK);
  CHECK(fabs(lse64[0] - log(4.0)) < 1e-14);
  CHECK(fabs(out64[0] - 1.5) < 1e-14);

  parts[0] = parts[1] = tensor(v);
  lses[0] = lses[1] = lse;
  memset(&merge, 0, sizeof(merge));
  merge.parts = parts;
  merge.part_lses = lses;
  merge.count = 2;
  merge.out = tensor(out);
  CHECK(adaattn_merge(&merge) == ADAATTN_OK);
  CHECK(out[7] == v[7]);
}

static void test_describe(void) {
  char text[64];
  size_t needed = 0;
  CHECK(adaattn_describe(NULL, NULL, 0, &needed) == ADAATTN_OK);
  CHECK(needed > sizeof(text));
  CHECK(adaattn_describe(NULL, text, sizeof(text), NULL) == ADAATTN_OK);
  CHECK(strlen(text) == sizeof(text) - 1);
}

int main(void) {
  test_defaults();
  test_forward_and_backward();
  test_refusals();
  test_merge_and_reference();
  test_describe();
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
