// Times tile sizes of the sm_80 forward kernel against each other, in turns: the ones that are built, and those that
// might be. Prints TFLOP/s by medians, 4 B H N^2 D counted, half under a causal mask, and whether all agree.
//
//     build/cuda/bench/tile_sizes        # B N = 32,768, H D = 2,048, bfloat16
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/sm80/forward/kernel.cuh"
#include "cuda/sm80/forward/launch.h"

namespace {

using adaattn::cuda::sm80::ForwardConfig;
using adaattn::cuda::sm80::ForwardParams;
using Element = __nv_bfloat16;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "tile_sizes: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

struct Contestant {
  std::string name;
  std::function<void(const ForwardParams&)> run;
};

template <typename Config>
Contestant contestant(const char* note) {
  const auto run = [](ForwardParams params) {
    const auto kernel = adaattn::cuda::sm80::forward_kernel<Element, Config, false>;
    constexpr int kBytes = sizeof(adaattn::cuda::sm80::ForwardShared<Config>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    params.tiles_per_head = (params.query_count + Config::kQueries - 1) / Config::kQueries;
    kernel<<<params.batch * params.heads * params.tiles_per_head, Config::kThreads, kBytes>>>(params);
    check(cudaGetLastError());
  };
  char name[128];
  std::snprintf(name, sizeof(name), "%3d queries (%d a warp) x %3d keys, %d slots, %d blocks, q %s%s", Config::kQueries,
                16 * Config::kStrips, Config::kKeys, Config::kSlots, Config::kBlocks,
                Config::kKeepQueries ? "kept" : "read", note);
  return {name, run};
}

std::vector<Contestant> contestants(int dim) {
  using namespace adaattn::cuda::sm80;
  if (dim == 64)
    return {contestant<Dim64>("  <- built"),
            contestant<ForwardConfig<64, 4, 2, 64, 4, 2, true>>(""),
            contestant<ForwardConfig<64, 4, 2, 64, 4, 2, false>>(""),
            contestant<ForwardConfig<64, 4, 2, 128, 3, 2, false>>(""),
            contestant<ForwardConfig<64, 4, 2, 32, 4, 3, true>>(""),
            contestant<ForwardConfig<64, 4, 1, 64, 4, 4, true>>("")};
  if (dim == 128)
    return {contestant<Dim128>("  <- built"),
            contestant<ForwardConfig<128, 4, 2, 32, 4, 2, false>>(""),
            contestant<ForwardConfig<128, 4, 2, 32, 3, 2, false>>(""),
            contestant<ForwardConfig<128, 4, 2, 64, 4, 2, false>>(""),
            contestant<ForwardConfig<128, 4, 1, 64, 3, 3, true>>(""),
            contestant<ForwardConfig<128, 8, 2, 64, 3, 1, false>>("")};
  return {contestant<Dim256>("  <- built"), contestant<ForwardConfig<256, 8, 1, 32, 4, 1, false>>("")};
}

// N(0, 1) numbers on the device; a million of them, again and again.
Element* normal(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<Element> some(std::min<std::size_t>(count, (1 << 20) + 3));
  for (Element& value : some) value = Element(draw(engine));
  Element* device = nullptr;
  check(cudaMalloc(&device, count * sizeof(Element)));
  for (std::size_t at = 0; at < count; at += some.size())
    check(cudaMemcpy(device + at, some.data(), std::min(some.size(), count - at) * sizeof(Element),
                     cudaMemcpyHostToDevice));
  return device;
}

float milliseconds(const Contestant& who, const ForwardParams& params, int calls) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaEventRecord(begin));
  for (int i = 0; i < calls; ++i) who.run(params);
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float time = 0;
  check(cudaEventElapsedTime(&time, begin, end));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return time / static_cast<float>(calls);
}

void compare(int dim, int tokens, bool causal) {
  const int batch = 32768 / tokens, heads = 2048 / dim;
  const std::size_t count = std::size_t{32768} * 2048;
  static Element *q = normal(count, 1), *k = normal(count, 2), *v = normal(count, 3), *out = normal(count, 4);
  ForwardParams params{};
  const auto view = [&](Element* data) {
    return adaattn::cuda::sm80::MatrixView{
        .data = data, .stride = {std::int64_t{heads} * tokens * dim, std::int64_t{tokens} * dim, dim}};
  };
  params.q = view(q), params.k = view(k), params.v = view(v), params.out = view(out);
  params.scale_log2 = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(dim)));
  params.batch = batch, params.heads = heads, params.group = 1;
  params.query_count = params.key_count = tokens;
  params.dim = params.dim_v = dim;
  adaattn_options options{};
  options.causal = causal;
  options.window_left = options.window_right = -1;
  params.visibility = adaattn::make_visibility(options, tokens, tokens);
  params.heads_at_once = causal ? std::clamp((20 << 20) / (tokens * dim * 4), 1, batch * heads) : 1;

  const std::vector<Contestant> all = contestants(dim);
  std::vector<std::vector<float>> times(all.size());
  std::vector<Element> first(1 << 20), other(first.size());
  std::vector<double> apart(all.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    check(cudaMemset(out, 0xFF, count * sizeof(Element)));
    all[i].run(params);
    check(cudaMemcpy((i == 0 ? first : other).data(), out, first.size() * sizeof(Element), cudaMemcpyDeviceToHost));
    if (i == 0) continue;
    double difference = 0, norm = 0;
    for (std::size_t j = 0; j < first.size(); ++j) {
      const double a = static_cast<float>(first[j]), b = static_cast<float>(other[j]);
      difference += (a - b) * (a - b), norm += a * a;
    }
    apart[i] = std::sqrt(difference / norm);
  }
  for (int round = 0; round < 5; ++round)
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float once = milliseconds(all[i], params, 1);
      const int calls = std::max(3, static_cast<int>(20 / once));
      milliseconds(all[i], params, calls);  // unmeasured: the power limit sets the clocks
      times[i].push_back(milliseconds(all[i], params, calls));
    }
  std::printf("D %d, N %d%s\n", dim, tokens, causal ? ", causal" : "");
  const double flop = 4.0 * batch * heads * tokens * static_cast<double>(tokens) * dim / (causal ? 2 : 1);
  for (std::size_t i = 0; i < all.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    std::printf("  %6.1f  %s%s\n", flop / times[i][times[i].size() / 2] * 1e-9, all[i].name.c_str(),
                apart[i] < 5e-3 ? "" : "  WRONG");  // two roundings of probabilities apart, 2^-8 each at most
  }
  std::fflush(stdout);
}

}  // namespace

int main() {
  for (const int dim : {64, 128, 256})
    for (const bool causal : {false, true})
      for (const int tokens : {1024, 8192}) compare(dim, tokens, causal);
}
