/* Attention over a padded batch from C: sizes the workspace, runs, and shows what an error looks like. */
#include <adaattn/adaattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kBatch = 2, kHeads = 2, kTokens = 8, kDim = 16, kElements = kBatch * kHeads * kTokens * kDim };

static float q[kElements], k[kElements], v[kElements], out[kElements];

static adaattn_tensor tensor(float* data) {
  adaattn_tensor t = {0};
  t.data = data;
  t.dtype = ADAATTN_FLOAT32;
  t.device = ADAATTN_CPU;
  t.shape[0] = kBatch, t.shape[1] = kHeads, t.shape[2] = kTokens, t.shape[3] = kDim;
  t.stride[0] = kHeads * kTokens * kDim, t.stride[1] = kTokens * kDim, t.stride[2] = kDim, t.stride[3] = 1;
  return t;
}

int main(void) {
  const int64_t key_lengths[kBatch] = {kTokens, 1}; /* the second entry of the batch has one key; the rest is padding */
  adaattn_forward_args args = {0};
  size_t bytes = 0;
  void* memory;
  int i;

  if (adaattn_abi_version() != ADAATTN_ABI_VERSION) {
    fprintf(stderr, "the header and the library do not match\n");
    return 1;
  }
  for (i = 0; i < kElements; ++i) {
    q[i] = sinf(0.3f * (float)i);
    k[i] = cosf(0.7f * (float)i);
    v[i] = sinf(0.1f * (float)i);
  }
  args.q = tensor(q);
  args.k = tensor(k);
  args.v = tensor(v);
  args.out = tensor(out);
  args.key_lengths = key_lengths;
  args.options = adaattn_default_options();

  if (adaattn_forward_workspace(&args, &bytes) != ADAATTN_OK) {
    fprintf(stderr, "%s\n", adaattn_last_error());
    return 1;
  }
  memory = malloc(bytes + 64);
  if (memory == NULL) return 1;
  args.workspace = (void*)(((uintptr_t)memory + 63) / 64 * 64);
  args.workspace_bytes = bytes;
  if (adaattn_forward(&args) != ADAATTN_OK) {
    fprintf(stderr, "%s\n", adaattn_last_error());
    return 1;
  }
  printf("AdaAttn %s: out[1, 0, 5, 0] = %f, the value of its only key is %f\n", adaattn_version(),
         out[kElements / 2 + 5 * kDim], v[kElements / 2]);
  if (fabsf(out[kElements / 2 + 5 * kDim] - v[kElements / 2]) > 1e-6f) return 1;

  args.options.scale = NAN;
  args.options.has_scale = 1;
  if (adaattn_forward(&args) != ADAATTN_INVALID_ARGUMENT) return 1;
  printf("a refusal names the argument: %s\n", adaattn_last_error());
  free(memory);
  return 0;
}
