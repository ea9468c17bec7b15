// Fuzzes the C interface: whatever the structs hold, a call ends with a status, a refusal has a reason, and memory that
// is not the call's stays untouched (the sanitizers watch).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "adaattn/adaattn.h"
#include "hostile.h"

namespace adaattn::fuzz {
namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s; last error: %s\n", what, adaattn_last_error());
  std::abort();
}

void check(adaattn_status status) {
  require(status >= ADAATTN_OK && status < ADAATTN_INTERNAL_ERROR, "an internal error or an unknown status");
  require((status == ADAATTN_OK) == (std::strlen(adaattn_last_error()) == 0), "status and reason do not fit together");
}

struct Sizes {
  std::int64_t batch, query_heads, key_heads, queries, keys, dim, value_dim;
  std::int32_t dtype;
  explicit Sizes(Hostile& from)
      : batch(from.in(1, 3)),
        query_heads(0),
        key_heads(from.in(1, 3)),
        queries(from.count()),
        keys(from.count()),
        dim(from.dim()),
        value_dim(from.once_in(2) ? from.dim() : dim),
        dtype(from.dtype()) {
    query_heads = key_heads * from.in(1, 2);
    if (from.once_in(32)) batch = 0;
    if (from.once_in(32)) query_heads = key_heads = 0;
    if (from.once_in(64)) key_heads = from.in(0, 5);
  }
  std::int64_t rows() const { return batch * query_heads * queries; }
};

template <typename Args>
void fill_inputs(Hostile& from, const Sizes& s, Args& args) {
  args.q = from.tensor({s.batch, s.query_heads, s.queries, s.dim}, s.dtype);
  args.k = from.tensor({s.batch, s.key_heads, s.keys, s.dim}, s.dtype);
  args.v = from.tensor({s.batch, s.key_heads, s.keys, s.value_dim}, s.dtype);
  if (from.once_in(3)) {
    const auto one_or = [&](std::int64_t size) { return from.once_in(2) ? 1 : size; };
    const std::int32_t dtypes[] = {ADAATTN_BOOL, ADAATTN_FLOAT32, s.dtype};
    args.mask =
        from.tensor({one_or(s.batch), one_or(s.query_heads), one_or(s.queries), one_or(s.keys)}, from.one_of(dtypes));
  }
  // The array is as long as q's batch: that is what the call may read.
  if (from.once_in(3)) args.key_lengths = from.lengths(args.q.shape[0], s.keys);
  args.options = from.options();
}

// The workspace as asked for, or now and then too small, misaligned or missing.
template <typename Args, typename Query>
bool give_workspace(Hostile& from, Args& args, Query query) {
  std::size_t bytes = 0;
  const adaattn_status status = query(&args, &bytes);
  check(status);
  if (status != ADAATTN_OK) bytes = 64;
  if (bytes > (std::size_t{64} << 20)) return false;
  args.workspace = from.bytes(bytes, 64);
  args.workspace_bytes = bytes;
  if (from.once_in(32)) args.workspace_bytes = bytes / 2;
  if (from.once_in(64)) args.workspace = static_cast<std::byte*>(args.workspace) + 8;
  if (from.once_in(64)) args.workspace = nullptr;
  return true;
}

void fuzz_forward(Hostile& from) {
  const Sizes s(from);
  adaattn_forward_args args{};
  fill_inputs(from, s, args);
  args.out = from.tensor({s.batch, s.query_heads, s.queries, s.value_dim}, s.dtype);
  // Their length follows from q, whatever out says.
  const std::int64_t rows =
      args.q.shape[0] == s.batch && args.q.shape[1] == s.query_heads && args.q.shape[2] == s.queries ? s.rows() : -1;
  if (from.once_in(2)) args.lse = from.floats(rows);
  if (from.once_in(2)) args.entropy = from.floats(rows);
  if (from.once_in(2)) args.max_probability = from.floats(rows);
  if (from.once_in(4)) args.summarised_mass = from.floats(rows);
  if (from.once_in(4)) args.omitted_mass = from.floats(rows);
  switch (from.in(0, 8)) {
    case 0: {
      char text[4096];
      std::size_t needed = 0;
      check(adaattn_describe(from.once_in(4) ? nullptr : &args, text, from.in<std::size_t>(0, sizeof(text)), &needed));
      return;
    }
    case 1: {
      std::vector<double> out(static_cast<std::size_t>(std::max<std::int64_t>(s.rows() * s.value_dim, 1)));
      std::vector<double> lse(static_cast<std::size_t>(std::max<std::int64_t>(s.rows(), 1)));
      if (rows >= 0 && args.v.shape[3] == s.value_dim) check(adaattn_reference_forward(&args, out.data(), lse.data()));
      return;
    }
    default:
      if (give_workspace(from, args, adaattn_forward_workspace)) check(adaattn_forward(&args));
  }
}

void fuzz_backward(Hostile& from) {
  const Sizes s(from);
  adaattn_backward_args args{};
  fill_inputs(from, s, args);
  const Shape out = {s.batch, s.query_heads, s.queries, s.value_dim};
  args.out = from.tensor(out, s.dtype);
  args.dout = from.tensor(out, s.dtype);
  args.dq = from.tensor({s.batch, s.query_heads, s.queries, s.dim}, s.dtype);
  args.dk = from.tensor({s.batch, s.key_heads, s.keys, s.dim}, s.dtype);
  args.dv = from.tensor({s.batch, s.key_heads, s.keys, s.value_dim}, s.dtype);
  if (!from.once_in(32)) args.lse = from.floats(s.rows());
  if (give_workspace(from, args, adaattn_backward_workspace)) check(adaattn_backward(&args));
}

void fuzz_merge(Hostile& from) {
  const Sizes s(from);
  const Shape shape = {s.batch, s.query_heads, s.queries, s.value_dim};
  adaattn_tensor parts[4];
  const float* lses[4];
  const int count = from.in(1, 4);
  for (int i = 0; i < count; ++i) {
    parts[i] = from.tensor(shape, s.dtype);
    lses[i] = from.once_in(64) ? nullptr : from.floats(s.rows());
  }
  adaattn_merge_args args{};
  args.parts = from.once_in(64) ? nullptr : parts;
  args.part_lses = from.once_in(64) ? nullptr : lses;
  args.count = from.once_in(64) ? -from.in<std::int64_t>(0, INT64_MAX) : count;
  args.out = from.once_in(4) ? parts[0] : from.tensor(shape, s.dtype);
  if (from.once_in(2)) args.lse = from.floats(s.rows());
  args.num_threads = from.once_in(32) ? static_cast<std::int32_t>(from.wild_integer()) : 1;
  check(adaattn_merge(&args));
}

bool is_shape(const adaattn_tensor& tensor, const Shape& shape) {
  return std::equal(shape.begin(), shape.end(), tensor.shape);
}

void fuzz_measure(Hostile& from) {
  const Sizes s(from);
  adaattn_measure_args args{};
  fill_inputs(from, s, args);
  args.statistics = from.once_in(16) ? static_cast<std::uint32_t>(from.wild_integer()) : from.in(1U, 31U);
  args.power_iterations = from.once_in(32) ? static_cast<std::int32_t>(from.wild_integer()) : from.in(0, 2);
  args.sample_rows = from.once_in(32) ? from.wild_integer() : from.in(1, 70);
  args.sketch = from.once_in(32) ? from.wild_integer() : from.in(0, 12);
  args.seed = static_cast<std::uint64_t>(from.wild_integer());
  if (from.once_in(8)) args.v.data = nullptr;
  // The results' length follows from q and k, whatever was meant.
  if (!is_shape(args.q, {s.batch, s.query_heads, s.queries, s.dim}) ||
      !is_shape(args.k, {s.batch, s.key_heads, s.keys, s.dim}))
    return check(adaattn_measure_workspace(&args, std::make_unique<std::size_t>().get()));
  const auto heads = static_cast<std::size_t>(s.batch * s.query_heads), dim = static_cast<std::size_t>(s.dim);
  const auto key_heads = static_cast<std::size_t>(s.batch * s.key_heads);
  const std::int64_t rows = std::min(std::max<std::int64_t>(args.sample_rows, 0), s.queries);
  const auto core = static_cast<std::size_t>(args.sketch > 0 && args.sketch < rows ? args.sketch : rows);
  std::vector<adaattn_head_statistics> statistics(heads + 1);
  std::vector<double> gram_q(heads * dim * dim + 1), gram_k(key_heads * dim * dim + 1), cores(heads * core * core + 1);
  if (!from.once_in(64)) args.heads = statistics.data();
  if (!from.once_in(64)) args.gram_q = gram_q.data();
  if (!from.once_in(64)) args.gram_k = gram_k.data();
  if (!from.once_in(64)) args.softmax_core = cores.data();
  if (give_workspace(from, args, adaattn_measure_workspace)) check(adaattn_measure(&args));
}

}  // namespace
}  // namespace adaattn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  adaattn::fuzz::Hostile from(data, size);
  switch (from.in(0, 4)) {
    case 0:
    case 1: adaattn::fuzz::fuzz_forward(from); break;
    case 2: adaattn::fuzz::fuzz_backward(from); break;
    case 3: adaattn::fuzz::fuzz_measure(from); break;
    default: adaattn::fuzz::fuzz_merge(from);
  }
  return 0;
}
