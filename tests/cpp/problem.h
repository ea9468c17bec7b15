// The tensors and arguments of one case: seeded random inputs, poisoned outputs, a workspace of the size asked for.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "adaattn/attention.h"
#include "buffer.h"
#include "cases.h"

namespace adaattn::testing {

class Problem {
 public:
  explicit Problem(const cases::Case& c)
      : c_(c),
        q({c.batch, c.query_heads, c.queries, c.dim}, c.dtype, c.layout),
        k({c.batch, c.key_heads, c.keys, c.dim}, c.dtype, c.layout),
        v({c.batch, c.key_heads, c.keys, c.dv()}, c.dtype, c.layout),
        dout({c.batch, c.query_heads, c.queries, c.dv()}, c.dtype, c.layout),
        out({c.batch, c.query_heads, c.queries, c.dv()}, c.dtype, c.layout, /*written=*/true),
        dq({c.batch, c.query_heads, c.queries, c.dim}, c.dtype, c.layout, /*written=*/true),
        dk({c.batch, c.key_heads, c.keys, c.dim}, c.dtype, c.layout, /*written=*/true),
        dv({c.batch, c.key_heads, c.keys, c.dv()}, c.dtype, c.layout, /*written=*/true),
        lse(row_buffer()),
        entropy(row_buffer()),
        max_probability(row_buffer()) {
    q.fill_normal(1, c.spread);
    k.fill_normal(2, c.spread);
    v.fill_normal(3);
    dout.fill_normal(4);
    make_mask();
    if (c.key_lengths)
      for (std::int64_t b = 0; b < c.batch; ++b)
        lengths_.push_back(c.batch == 1 ? c.keys / 2 : c.keys * b / (c.batch - 1));
  }

  adaattn_options options() const {
    adaattn_options o = adaattn_default_options();
    o.causal = c_.causal ? 1 : 0;
    o.alignment = c_.alignment;
    o.window_left = c_.window_left;
    o.window_right = c_.window_right;
    o.sinks = c_.sinks;
    o.has_scale = c_.scale.has_value() ? 1 : 0;
    o.scale = c_.scale.value_or(0);
    return o;
  }

  ForwardArgs forward_args() {
    ForwardArgs args = adaattn::forward_args(q.tensor(), k.tensor(), v.tensor(), out.tensor());
    args.mask = mask.tensor();
    args.key_lengths = lengths_.empty() ? nullptr : lengths_.data();
    args.lse = floats(lse);
    args.options = options();
    return args;
  }

  BackwardArgs backward_args() {
    BackwardArgs args{};
    args.q = q.tensor(), args.k = k.tensor(), args.v = v.tensor(), args.mask = mask.tensor();
    args.out = out.tensor(), args.dout = dout.tensor();
    args.lse = floats(lse);
    args.dq = dq.tensor(), args.dk = dk.tensor(), args.dv = dv.tensor();
    args.key_lengths = lengths_.empty() ? nullptr : lengths_.data();
    args.options = options();
    return args;
  }

  static float* floats(const Buffer& rows) { return static_cast<float*>(rows.tensor().data); }

 private:
  Buffer row_buffer() const {
    return {{c_.batch, c_.query_heads, c_.queries, 1}, ADAATTN_FLOAT32, cases::Layout::kContiguous, true};
  }

  void make_mask() {
    using cases::MaskKind;
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    const auto boolean = [&](std::array<std::int64_t, 4> shape, double visible) {
      mask = Buffer(shape, ADAATTN_BOOL, c_.layout);
      Random random(5);
      mask.fill([&](auto...) { return random.uniform() < visible ? 1.0f : 0.0f; });
    };
    const auto additive = [&](std::array<std::int64_t, 4> shape, adaattn_dtype dtype) {
      mask = Buffer(shape, dtype, c_.layout);
      Random random(5);
      mask.fill([&](auto...) { return random.uniform() < 0.2 ? kHidden : random.normal(); });
    };
    switch (c_.mask) {
      case MaskKind::kNone: break;
      case MaskKind::kBool: boolean({c_.batch, c_.query_heads, c_.queries, c_.keys}, 0.5); break;
      case MaskKind::kBoolKeyPadding: boolean({c_.batch, 1, 1, c_.keys}, 0.7); break;
      case MaskKind::kBoolHidesWholeRows: boolean({1, 1, c_.queries, 1}, 0.6); break;
      case MaskKind::kAdditiveFloat32: additive({c_.batch, 1, c_.queries, c_.keys}, ADAATTN_FLOAT32); break;
      case MaskKind::kAdditiveSameDtype: additive({1, c_.query_heads, c_.queries, c_.keys}, c_.dtype); break;
    }
  }

  cases::Case c_;

 public:
  Buffer q, k, v, mask, dout;            // read
  Buffer out, dq, dk, dv;                // written
  Buffer lse, entropy, max_probability;  // [B, Hq, Nq, 1] float32

 private:
  std::vector<std::int64_t> lengths_;
};

}  // namespace adaattn::testing
