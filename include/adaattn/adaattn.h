/* The C interface of AdaAttn: scaled dot-product attention with an error budget.
 *
 *   out = softmax(scale * q k^T + mask) v          per (batch, query head)
 *
 * Every function returns an adaattn_status; on failure adaattn_last_error() has the reason, naming the argument,
 * what it was and what is allowed. No call synchronises with a device or keeps a pointer after it returns, but for one
 * that asks a GPU for reports (adaattn_forward_args.heads). None but those, calls on GPUs with plans and the FP64
 * reference allocates: scratch memory is the caller's (ask the matching *_workspace function for its size).
 * Calls may come from any number of threads at once.
 */
#ifndef ADAATTN_ADAATTN_H_
#define ADAATTN_ADAATTN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(ADAATTN_BUILD)
#define ADAATTN_API __attribute__((visibility("default")))
#else
#define ADAATTN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a struct below changes layout or meaning; adaattn_abi_version() is what the library was built with. */
#define ADAATTN_ABI_VERSION 3

typedef enum adaattn_status {
  ADAATTN_OK = 0,
  ADAATTN_INVALID_ARGUMENT = 1, /* an argument is malformed, or two do not fit together */
  ADAATTN_UNSUPPORTED = 2,      /* well-formed, but no kernel takes it; the message lists each and why it declined */
  ADAATTN_WORKSPACE_TOO_SMALL = 3,
  ADAATTN_INTERNAL_ERROR = 4
} adaattn_status;

typedef enum adaattn_dtype {
  ADAATTN_FLOAT32 = 0,
  ADAATTN_FLOAT16 = 1,  /* IEEE binary16 */
  ADAATTN_BFLOAT16 = 2, /* the upper half of a binary32 */
  ADAATTN_BOOL = 3      /* one byte; masks only: 0 hides the key, anything else shows it */
} adaattn_dtype;

typedef enum adaattn_device { ADAATTN_CPU = 0, ADAATTN_CUDA = 1 } adaattn_device;

/* Which query and key the mask diagonal starts from, when Nq != Nk. */
typedef enum adaattn_alignment {
  ADAATTN_TOP_LEFT = 0,    /* query 0 stands at key 0 (torch's is_causal) */
  ADAATTN_BOTTOM_RIGHT = 1 /* the last query stands at the last key (a query that follows a KV cache) */
} adaattn_alignment;

/* A strided view; it owns nothing. Strides count elements, not bytes; they may be negative or, in inputs, 0. */
typedef struct adaattn_tensor {
  void* data;        /* aligned to its element; may be NULL only if a dimension is 0 */
  int32_t dtype;     /* adaattn_dtype */
  int32_t device;    /* adaattn_device */
  int64_t shape[4];  /* [batch, heads, tokens, dim] */
  int64_t stride[4]; /* in elements */
} adaattn_tensor;

/* What the caller asks for. Fill it with adaattn_default_options() first. */
typedef struct adaattn_options {
  double error;          /* budget: relative Frobenius error of each (batch, query head) output, >= 0; 0 is exact */
  double scale;          /* factor on q k^T, finite; looked at only if has_scale is 1 */
  int32_t has_scale;     /* 0: the scale is 1 / sqrt(D) */
  int32_t causal;        /* 1 hides every key after the diagonal */
  int32_t alignment;     /* adaattn_alignment, for causal and for the window */
  int64_t window_left;   /* keys more than this many before the diagonal are hidden; -1: no limit */
  int64_t window_right;  /* keys more than this many after the diagonal are hidden; -1: no limit */
  int64_t sinks;         /* this many first keys stay visible left of the window (StreamingLLM, arXiv 2309.17453) */
  int32_t num_threads;   /* CPU threads, at most 1024; 0: OpenMP's default */
  int32_t deterministic; /* 1: the same inputs give the same bits on every run (CPU kernels always do) */
  int32_t guarantee;     /* adaattn_guarantee: what error promises; looked at only if error > 0 */
  const char* kernel;    /* name of the only kernel to consider, NULL: the first of the table that takes the problem */
} adaattn_options;

typedef enum adaattn_form {
  ADAATTN_AUTOMATIC = -1, /* in plans only: the engine chooses */
  ADAATTN_DENSE = 0,      /* every visible score was computed and used */
  ADAATTN_TILED = 1,      /* tiles of keys in classes, see adaattn_tile_class */
  ADAATTN_LOW_RANK = 2    /* attention over a weighted coreset of the keys */
} adaattn_form;

/* Of products; sums are kept in float32 or, for int8, exactly. */
typedef enum adaattn_precision {
  ADAATTN_PRECISION_FLOAT32 = 0,
  ADAATTN_PRECISION_FLOAT16 = 1,
  ADAATTN_PRECISION_BFLOAT16 = 2,
  ADAATTN_PRECISION_INT8 = 3,
  ADAATTN_PRECISION_FLOAT8 = 4 /* e4m3 */
} adaattn_precision;

/* What becomes of a tile of 64 keys seen from a panel of neighbouring queries; on GPUs of a block of 128 keys seen from
 * the neighbouring queries, 64 to 256 of them, that the kernel takes at once, which is high or dropped. */
typedef enum adaattn_tile_class {
  ADAATTN_TILE_HIDDEN = 0,        /* no query of the panel sees it */
  ADAATTN_TILE_DROPPED = 1,       /* left out by the screen, not scored */
  ADAATTN_TILE_POOLED = 2,        /* left out by the screen; means of 16 keys and values stand for it */
  ADAATTN_TILE_SUMMARISED = 3,    /* scored in the plan's precision; its mass times its mean v stands for it */
  ADAATTN_TILE_LOW = 4,           /* scored and multiplied with v in the plan's low precision */
  ADAATTN_TILE_HIGH = 5,          /* scored and multiplied with v in the plan's precision */
  ADAATTN_TILE_SUMMARISED_LOW = 6 /* as summarised, but scored in the plan's low precision; reports count both as one */
} adaattn_tile_class;

/* How one (batch, query head) is, or was, carried out. The numbers in it are thresholds on shares of a row's softmax,
 * so that a plan suits other inputs of the head, too; never positions of tiles. On GPUs heads are dense, or tiled with
 * screen as the only threshold, in steps of half a power of two down to -8.3: the others, pooled and the precisions of
 * a given plan are not looked at, for products are in the inputs' type. */
typedef struct adaattn_head_plan {
  int32_t form;          /* adaattn_form */
  int32_t precision;     /* adaattn_precision of dense heads and of high tiles */
  int32_t low_precision; /* adaattn_precision of low tiles; the same as precision if there are none */
  int32_t pooled;        /* 1: what the screen leaves out is pooled, 0: dropped */
  int32_t rank;          /* keys in the coreset of a low-rank head, else 0 */
  float screen; /* natural log, <= 0: a tile is left out if its best screened score lies further below the row's best
                   for each query; -INFINITY: none is */
  float low;    /* natural log, <= 0: tiles whose best screened score lies further below the row's best for each
                   query are low; 0: as many as can be, -INFINITY: none */
  float drop;   /* share, 0 to 1: a tile whose mass is at most this part of the row's sum so far is summarised */
} adaattn_head_plan;

typedef enum adaattn_guarantee {
  ADAATTN_MEASURED = 0, /* each head's error is estimated from probe rows, and kept below the budget */
  ADAATTN_BOUNDED = 1   /* every tile is scored, and an upper bound on each head's error is kept below the budget */
} adaattn_guarantee;

/* What one (batch, query head) took. Tiles are 64 keys by one panel of neighbouring queries, on GPUs 128 keys by as
 * many queries as the kernel takes at once, 64 to 256; dense heads count none. */
typedef struct adaattn_head_report {
  adaattn_head_plan plan; /* that gave the output; form is what the head ran as */
  int32_t escalations;    /* times the head was run again because its error was not accepted */
  int32_t reserved;       /* 0 */
  double estimated_error; /* relative Frobenius error, measured on evenly spaced rows; 0 for dense float32 heads, and
                             for dense heads on GPUs */
  double estimated_limit; /* upper end of the estimate's confidence interval: what is held below the budget */
  double error_bound;     /* upper bound on it; INFINITY where none is known */
  double work;            /* multiply-adds, planning and verification included, over those of dense attention; 8-bit
                             ones count half */
  int64_t tiles;          /* that some query of the panel sees */
  int64_t high_tiles;     /* of each adaattn_tile_class */
  int64_t low_tiles;
  int64_t summarised_tiles;
  int64_t pooled_tiles;
  int64_t dropped_tiles;
  int64_t saturated;      /* elements of q, k and v that an 8-bit cast clipped */
  double summarised_mass; /* mean over the rows of what the arguments of the forward pass call so; NaN: not asked for,
                             or not known (low-rank heads) */
  double omitted_mass;    /* likewise */
  double accounted_error; /* estimated relative Frobenius error by summaries and dropped tiles alone, rounding and
                             pooled tiles not counted: from summarised tiles' true p v, and masses and mean v of dropped
                             ones. NaN: neither mass was asked for, or not known (low-rank heads; bounded ones have
                             error_bound) */
} adaattn_head_report;

/* Wall time of a call's stages, in seconds. Calls that run no stages (exact ones) count as attend. NaN on GPUs, which
 * are still at work when a call returns. */
typedef struct adaattn_stage_times {
  double measure, plan, attend, verify;
} adaattn_stage_times;

/* Forward pass. B batches, Hq query heads, Hk key heads (Hk divides Hq; query head h reads key head h * Hk / Hq). */
typedef struct adaattn_forward_args {
  adaattn_tensor q;       /* [B, Hq, Nq, D] float32, float16 or bfloat16 */
  adaattn_tensor k;       /* [B, Hk, Nk, D] dtype of q */
  adaattn_tensor v;       /* [B, Hk, Nk, Dv] dtype of q */
  adaattn_tensor mask;    /* [B|1, Hq|1, Nq|1, Nk|1] bool, or additive in float32 or q's dtype; data NULL: no mask */
  adaattn_tensor out;     /* [B, Hq, Nq, Dv] dtype of q; written. Rows that see no key become 0 */
  float* lse;             /* [B, Hq, Nq] contiguous, natural log of the row's sum; -inf where no key is seen; or NULL */
  float* entropy;         /* [B, Hq, Nq] contiguous, entropy of the row's softmax in nats; or NULL */
  float* max_probability; /* [B, Hq, Nq] contiguous, largest softmax entry of the row; or NULL */
  const int64_t* key_lengths; /* [B], keys at or after it are hidden and never read, 0 <= length <= Nk; or NULL */
  adaattn_options options;
  void* workspace; /* adaattn_forward_workspace() bytes, 64-byte aligned, on q's device */
  size_t workspace_bytes;
  void* stream;                   /* cudaStream_t for CUDA tensors, else NULL */
  adaattn_head_report* heads;     /* [B, Hq] contiguous, in host memory, written; or NULL. On GPUs kernels that use a
                                     budget then wait for the stream, and refuse one that is being captured */
  const adaattn_head_plan* plans; /* [B, Hq] contiguous, in host memory: what each head starts with; it is judged, and
                                     made more careful if need be, as the engine's own; or NULL: all automatic */
  uint8_t* tile_classes;          /* [B, Hq, ceil(Nq / P), ceil(Nk / 64)] contiguous, P = adaattn_panel_rows():
                                     adaattn_tile_class of each tile, for adaattn_backward; written; or NULL. CPU
                                     tensors only */
  adaattn_stage_times* times;     /* written; or NULL */
  float* summarised_mass; /* [B, Hq, Nq] contiguous, share of the row's softmax in tiles that means of v stand for:
                             summarised ones, and pooled ones as their pools have it; or NULL. CPU tensors only, as the
                             next; asking takes the screen's scores of dropped tiles again, and an eighth of what
                             summaries save. 0 for exact kernels, NaN for low-rank heads */
  float* omitted_mass;    /* [B, Hq, Nq] contiguous, share of the row's softmax in dropped tiles, an estimate from the
                             scores of the screen: they were not scored otherwise; or NULL. 0 and NaN likewise */
} adaattn_forward_args;

/* Backward pass from a given out and lse (they need not come from this library). Gradients are written, not added. */
typedef struct adaattn_backward_args {
  adaattn_tensor q, k, v, mask; /* as in the forward pass */
  adaattn_tensor out;           /* [B, Hq, Nq, Dv] dtype of q, read */
  adaattn_tensor dout;          /* [B, Hq, Nq, Dv] dtype of q */
  const float* lse;             /* [B, Hq, Nq] contiguous, read */
  adaattn_tensor dq;            /* [B, Hq, Nq, D] dtype of q */
  adaattn_tensor dk;            /* [B, Hk, Nk, D] dtype of q */
  adaattn_tensor dv;            /* [B, Hk, Nk, Dv] dtype of q */
  const int64_t* key_lengths;
  adaattn_options options;
  void* workspace; /* adaattn_backward_workspace() bytes, 64-byte aligned */
  size_t workspace_bytes;
  void* stream;
  const adaattn_head_plan* plans; /* [B, Hq] of a forward pass within a budget, as reported: the gradient is that of
                                     what it computed, tile by tile; or NULL: of exact attention */
  const uint8_t* tile_classes;    /* the forward pass's; NULL exactly if plans is */
} adaattn_backward_args;

/* Merges attention over disjoint sets of keys into attention over their union (what ring attention needs):
 * lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i. Parts with lse -inf do not count. On CUDA at
 * most 32 parts at a time, summed in float32. */
typedef struct adaattn_merge_args {
  const adaattn_tensor* parts;   /* [count] outputs, each [B, H, N, D], all of one dtype */
  const float* const* part_lses; /* [count], each [B, H, N] contiguous */
  int64_t count;                 /* >= 1 */
  adaattn_tensor out;            /* [B, H, N, D] dtype of the parts; may be one of them */
  float* lse;                    /* [B, H, N] contiguous, or NULL; may be one of part_lses */
  int32_t num_threads;
  void* stream; /* cudaStream_t for CUDA tensors, else NULL */
} adaattn_merge_args;

/* What adaattn_measure looks at; or-ed together. Each states its price, adaattn_head_statistics.work. */
typedef enum adaattn_statistic {
  ADAATTN_STATISTIC_RANGE = 1,            /* magnitudes of q, k and v, and the mean of k */
  ADAATTN_STATISTIC_ROWS = 2,             /* scores and softmax of sampled rows; the last two need and bring it, too */
  ADAATTN_STATISTIC_SCORE_SPECTRUM = 4,   /* gram_q and gram_k */
  ADAATTN_STATISTIC_OUTPUT = 8,           /* norm of the output of sampled rows */
  ADAATTN_STATISTIC_SOFTMAX_SPECTRUM = 16 /* softmax_core */
} adaattn_statistic;
#define ADAATTN_STATISTIC_COUNT 5

/* Of one (batch, query head); k and v are those of its key head, up to the key length. NaN: not asked for, nothing to
 * look at (no keys, no v), or not finite. */
typedef struct adaattn_head_statistics {
  double largest_q, largest_k, largest_v;    /* largest magnitude */
  double crest_q, crest_k, crest_v;          /* largest magnitude over root mean square; 1 is flat */
  double outliers_q, outliers_k, outliers_v; /* share of elements beyond 6 root mean squares, which an 8-bit cast with
                                                that range would clip */
  double key_mean;         /* norm of the mean key over the root mean square norm of the keys, 0 to 1 */
  double entropy;          /* of a row's softmax in nats, mean over the sampled rows */
  double max_probability;  /* largest softmax entry of a row, mean over the sampled rows */
  double score_deviation;  /* standard deviation of a row's visible scores, mean over the sampled rows */
  double score_range;      /* largest less smallest visible score of a row, mean over the sampled rows */
  double output_norm;      /* root mean square over the sampled rows of the output row's Euclidean norm */
  double softmax_energy;   /* squared Frobenius norm of the sampled rows' softmax */
  double softmax_residual; /* what the sketch leaves out of the sampled rows' softmax, in spectral norm, is at most this
                              with probability 1 - 1e-10 (Halko, Martinsson and Tropp, arXiv 0909.4061, equation 4.3,
                              10 test vectors); 0 without a sketch */
  int64_t sampled_rows;    /* that see a key; what is a mean over the sampled rows is over these */
  double work[ADAATTN_STATISTIC_COUNT]; /* multiply-adds of each statistic, in the order of their bits, over those of
                                           dense attention; what key heads share is split among their query heads */
} adaattn_head_statistics;

/* Statistics of attention's inputs and softmax. M = min(sample_rows, Nq) rows are sampled, one at random in each of M
 * even parts of the sequence. */
typedef struct adaattn_measure_args {
  adaattn_tensor q, k, v, mask; /* as in the forward pass, on the CPU; v.data NULL: no values, and v is not looked at */
  const int64_t* key_lengths;
  adaattn_options options;  /* error, guarantee, deterministic and kernel are not looked at: results are the same on
                               every  run and for every number of threads */
  uint32_t statistics;      /* adaattn_statistic, or-ed */
  int32_t power_iterations; /* of the sketch, 0 to 16 */
  int64_t sample_rows;      /* 1 to 4096 */
  int64_t sketch;  /* L, 0 to 1024: columns of a randomized range finder for the sampled rows' softmax; 0, or at
                      least M: none, softmax_core is exact */
  uint64_t seed;   /* of the rows and of the sketch */
  void* workspace; /* adaattn_measure_workspace() bytes, 64-byte aligned */
  size_t workspace_bytes;
  adaattn_head_statistics* heads; /* [B, Hq] contiguous, written */
  double* gram_q; /* [B, Hq, D, D] contiguous, q^T q; written if the score spectrum is asked for, else may be NULL */
  double* gram_k; /* [B, Hk, D, D] contiguous, kc^T kc with kc = k less its mean; likewise. The singular values of
                     q kc^T, hidden pairs included, are the roots of the eigenvalues of gram_q gram_k */
  double* softmax_core; /* [B, Hq, S, S] contiguous, S = M, or L with a sketch: the softmax's singular values over the
                           sampled rows are the roots of its eigenvalues; written if the softmax spectrum is asked for,
                           else may be NULL */
} adaattn_measure_args;

ADAATTN_API uint32_t adaattn_abi_version(void);
ADAATTN_API const char* adaattn_version(void);

/* Neighbouring queries that share a tile's class on this machine: two vectors of float32. */
ADAATTN_API int32_t adaattn_panel_rows(void);

/* The reason of this thread's last failed call, "" if there was none. Valid until the thread's next call. */
ADAATTN_API const char* adaattn_last_error(void);

/* error 0, default scale, no causal mask, no window, no sinks, default threads, any kernel. */
ADAATTN_API adaattn_options adaattn_default_options(void);

/* Bytes of workspace that the call needs; pointers other than NULL-or-not are not looked at. */
ADAATTN_API adaattn_status adaattn_forward_workspace(const adaattn_forward_args* args, size_t* bytes);
ADAATTN_API adaattn_status adaattn_backward_workspace(const adaattn_backward_args* args, size_t* bytes);

ADAATTN_API adaattn_status adaattn_forward(const adaattn_forward_args* args);
ADAATTN_API adaattn_status adaattn_backward(const adaattn_backward_args* args);
ADAATTN_API adaattn_status adaattn_merge(const adaattn_merge_args* args);

ADAATTN_API adaattn_status adaattn_measure_workspace(const adaattn_measure_args* args, size_t* bytes);
ADAATTN_API adaattn_status adaattn_measure(const adaattn_measure_args* args);

/* FP64 attention, the truth that every error is measured against: args->out, entropy, max_probability and the workspace
 * are ignored. out is [B, Hq, Nq, Dv] and lse [B, Hq, Nq], both contiguous; either may be NULL. CPU tensors only. */
ADAATTN_API adaattn_status adaattn_reference_forward(const adaattn_forward_args* args, double* out, double* lse);
/* Its gradients in FP64, from q, k, v, mask and dout alone: dq [B, Hq, Nq, D], dk [B, Hk, Nk, D], dv [B, Hk, Nk, Dv],
 * contiguous. args->out, lse, dq, dk and dv are ignored. */
ADAATTN_API adaattn_status adaattn_reference_backward(const adaattn_backward_args* args, double* dq, double* dk,
                                                      double* dv);

/* JSON for people and programs: version, devices, instruction sets, and every kernel of the table in order, each with
 * the reasons why this machine, or the problem in args if it is not NULL, cannot use it.
 * Writes at most capacity bytes with the final 0; *needed (may be NULL) receives the bytes that the whole takes. */
ADAATTN_API adaattn_status adaattn_describe(const adaattn_forward_args* args, char* json, size_t capacity,
                                            size_t* needed);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* ADAATTN_ADAATTN_H_ */
