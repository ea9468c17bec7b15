// Causal attention of 4 query heads on 2 key heads, its gradients, and what the library would pick, from C++.
#include <adaattn/attention.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  constexpr std::int64_t kBatch = 1, kQueryHeads = 4, kKeyHeads = 2, kTokens = 256, kDim = 64;
  std::vector<float> q(kBatch * kQueryHeads * kTokens * kDim), k(kBatch * kKeyHeads * kTokens * kDim), v(k.size());
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = std::sin(0.37f * static_cast<float>(i));
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = std::cos(0.11f * static_cast<float>(i));
    v[i] = std::sin(0.05f * static_cast<float>(i));
  }
  std::vector<float> out(q.size()), lse(kBatch * kQueryHeads * kTokens);

  try {
    const auto queries = adaattn::view(q.data(), {kBatch, kQueryHeads, kTokens, kDim});
    const auto keys = adaattn::view(k.data(), {kBatch, kKeyHeads, kTokens, kDim});
    const auto values = adaattn::view(v.data(), {kBatch, kKeyHeads, kTokens, kDim});
    const auto output = adaattn::view(out.data(), {kBatch, kQueryHeads, kTokens, kDim});

    adaattn::ForwardArgs forward = adaattn::forward_args(queries, keys, values, output);
    forward.options.causal = 1;
    forward.lse = lse.data();
    adaattn::forward(forward);
    std::printf("out[0, 0, 255, 0] = %f, lse = %f\n", out[255 * kDim], lse[255]);

    std::vector<float> dout(out.size(), 1.0f), dq(q.size()), dk(k.size()), dv(v.size());
    adaattn::BackwardArgs backward{};
    backward.q = queries, backward.k = keys, backward.v = values, backward.out = output;
    backward.dout = adaattn::view(dout.data(), {kBatch, kQueryHeads, kTokens, kDim});
    backward.lse = lse.data();
    backward.dq = adaattn::view(dq.data(), {kBatch, kQueryHeads, kTokens, kDim});
    backward.dk = adaattn::view(dk.data(), {kBatch, kKeyHeads, kTokens, kDim});
    backward.dv = adaattn::view(dv.data(), {kBatch, kKeyHeads, kTokens, kDim});
    backward.options = forward.options;
    adaattn::backward(backward);

    // Every softmax row sums to 1, so with dout = 1 each channel of dv adds up to the number of queries that read it.
    double sum = 0;
    for (std::int64_t token = 0; token < kTokens; ++token) sum += dv[token * kDim];
    std::printf("dv summed over the keys: %f, expected %d\n", sum, static_cast<int>(2 * kTokens));
    if (std::abs(sum - 2.0 * kTokens) > 1e-2) return 1;

    std::printf("%s\n", adaattn::describe(&forward).c_str());
  } catch (const adaattn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
