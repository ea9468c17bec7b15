// The problem of one query head alone, as if the call had been made for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/tensor.h"

namespace adaattn::cpu {

inline void select_head(adaattn_tensor& t, std::int64_t b, std::int64_t h) {
  t.data = static_cast<std::byte*>(t.data) + offset_of(t, b, h, 0, 0) * dtype_size(t.dtype);
  t.shape[0] = t.shape[1] = 1;
}

// head counts over [B, Hq]. Reports, plans and tile classes stay the call's.
inline adaattn_forward_args head_problem(const adaattn_forward_args& args, std::int64_t head) {
  const std::int64_t b = head / args.q.shape[1], h = head % args.q.shape[1];
  const std::int64_t key_head = h / (args.q.shape[1] / args.k.shape[1]), row = head * args.q.shape[2];
  adaattn_forward_args one = args;
  select_head(one.q, b, h);
  select_head(one.k, b, key_head);
  select_head(one.v, b, key_head);
  select_head(one.out, b, h);
  if (args.lse != nullptr) one.lse = args.lse + row;
  if (args.entropy != nullptr) one.entropy = args.entropy + row;
  if (args.max_probability != nullptr) one.max_probability = args.max_probability + row;
  if (args.summarised_mass != nullptr) one.summarised_mass = args.summarised_mass + row;
  if (args.omitted_mass != nullptr) one.omitted_mass = args.omitted_mass + row;
  if (args.key_lengths != nullptr) one.key_lengths = args.key_lengths + b;
  return one;
}

inline std::int64_t key_head_of(const adaattn_forward_args& args, std::int64_t head) {  // over [B, Hk]
  return head / args.q.shape[1] * args.k.shape[1] + head % args.q.shape[1] / (args.q.shape[1] / args.k.shape[1]);
}

}  // namespace adaattn::cpu
