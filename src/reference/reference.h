// FP64 attention, written to be read: the truth of every test and of every error that the library reports.
#pragma once

#include "adaattn/adaattn.h"

namespace adaattn::reference {

// out [B, Hq, Nq, Dv] and lse [B, Hq, Nq], contiguous; either may be null.
void forward(const adaattn_forward_args& args, double* out, double* lse);

// Of each row's softmax: the entropy in nats and the largest entry, [B, Hq, Nq], contiguous; either may be null. Rows
// that see no key have 0 for both.
void statistics(const adaattn_forward_args& args, float* entropy, float* max_probability);

// dq [B, Hq, Nq, D], dk [B, Hk, Nk, D], dv [B, Hk, Nk, Dv], contiguous.
void backward(const adaattn_backward_args& args, double* dq, double* dk, double* dv);

}  // namespace adaattn::reference
