#include "expected.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <sstream>

namespace adaattn::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUnit = 0x1p-24;    // of FP32
constexpr double kExp = 4 * kUnit;   // relative error of one exp
constexpr double kLambda = 3;        // see the header
constexpr double kLongestSum = 256;  // terms added plainly before a compensated step takes over: no growth with Nk

double gamma(double n) { return kLambda * std::sqrt(n) * kUnit; }

// Rounding to the output's dtype: half a unit in the last place, or half the spacing of subnormal numbers.
double rounding(adaattn_dtype dtype, double value) {
  switch (dtype) {
    case ADAATTN_FLOAT16: return std::max(std::abs(value) * 0x1p-11, 0x1p-25);
    case ADAATTN_BFLOAT16: return std::max(std::abs(value) * 0x1p-8, 0x1p-134);
    default: return std::max(std::abs(value) * kUnit, 0x1p-126);  // a kernel may flush subnormal results
  }
}

// The words of the C interface, one query and key at a time.
bool visible(const adaattn_options& o, std::int64_t query, std::int64_t key, std::int64_t queries, std::int64_t keys) {
  if (key >= keys) return false;
  const std::int64_t diagonal = query + (o.alignment == ADAATTN_BOTTOM_RIGHT ? keys - queries : 0);
  if (o.causal != 0 && key > diagonal) return false;
  if (o.window_right >= 0 && key > diagonal + o.window_right) return false;
  return o.window_left < 0 || key >= diagonal - o.window_left || key < o.sinks;
}

struct Row {
  std::vector<double> s, p, e_s, e_p;  // score, softmax, absolute error of the score, relative error of the softmax
  double lse = -kInfinity, e_lse = 0, top = -kInfinity;
};

class Analysis {
 public:
  Analysis(const cases::Case& c, const Problem& problem, const ForwardArgs& args)
      : c_(c),
        args_(args),
        q_(problem.q.values()),
        k_(problem.k.values()),
        v_(problem.v.values()),
        mask_(problem.mask.values()) {}

  Row row(std::int64_t b, std::int64_t h, std::int64_t i) const {
    const auto nk = static_cast<std::size_t>(c_.keys);
    Row r{.s = std::vector<double>(nk, -kInfinity), .p = std::vector<double>(nk), .e_s = r.p, .e_p = r.p};
    const std::int64_t g = h / group(), keys = args_.key_lengths != nullptr ? args_.key_lengths[b] : c_.keys;
    const double* q = &q_[offset(b, c_.query_heads, h, c_.queries, i, c_.dim)];
    for (std::int64_t j = 0; j < c_.keys; ++j) {
      const double term = visible(args_.options, i, j, c_.queries, keys) ? mask_term(b, h, i, j) : -kInfinity;
      if (term == -kInfinity) continue;
      const double* k = &k_[offset(b, c_.key_heads, g, c_.keys, j, c_.dim)];
      double dot = 0, magnitude = 0;
      for (std::int64_t d = 0; d < c_.dim; ++d) dot += q[d] * k[d], magnitude += std::abs(q[d] * k[d]);
      r.s[j] = scale() * dot + term;
      // The dot product, then the scale, the change of base for exp2 and the mask: one rounding each.
      r.e_s[j] = gamma(c_.dim) * std::abs(scale()) * magnitude + 4 * kUnit * (std::abs(r.s[j]) + std::abs(term));
      r.top = std::max(r.top, r.s[j]);
    }
    if (r.top == -kInfinity) return r;
    double sum = 0, mean_e_s = 0;
    for (std::size_t j = 0; j < nk; ++j) sum += r.p[j] = std::exp(r.s[j] - r.top);
    for (std::size_t j = 0; j < nk; ++j) mean_e_s += (r.p[j] /= sum) * r.e_s[j];
    for (std::size_t j = 0; j < nk; ++j)  // own score, exp and its argument, then the row sum
      if (r.p[j] > 0) r.e_p[j] = r.e_s[j] + mean_e_s + 2 * kExp + kUnit * (r.top - r.s[j]) + gamma(kLongestSum);
    r.lse = r.top + std::log(sum);
    r.e_lse = mean_e_s + gamma(kLongestSum) + 2 * kExp + 2 * kUnit * (std::abs(r.lse) + std::abs(r.top));
    return r;
  }

  void forward(Expected& want) const {
    const std::int64_t dv = c_.dv();
    want.out = Quantity(c_.batch * c_.query_heads * c_.queries * dv);
    want.lse = want.entropy = want.max_probability = Quantity(c_.batch * c_.query_heads * c_.queries);
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const Row r = row(b, h, i);
      const auto at = static_cast<std::size_t>(offset(b, c_.query_heads, h, c_.queries, i, 1));
      want.lse.value[at] = r.lse;
      want.lse.bound[at] = r.e_lse;
      double spread = 0, e_entropy = r.e_lse, largest = 0;  // entropy = lse - sum p s
      for (std::size_t j = 0; j < r.p.size(); ++j) {
        if (r.p[j] == 0) continue;
        spread += r.p[j] * (r.top - r.s[j]);
        e_entropy += r.p[j] * ((r.e_p[j] + gamma(kLongestSum)) * (r.top - r.s[j]) + r.e_s[j]);
        if (r.p[j] >= largest) largest = r.p[j], want.max_probability.bound[at] = r.p[j] * r.e_p[j] + kUnit;
      }
      want.max_probability.value[at] = largest;
      if (r.top == -kInfinity) return;  // no key: out, entropy and largest probability stay 0
      want.entropy.value[at] = r.lse - r.top + spread;
      want.entropy.bound[at] = e_entropy + 4 * kUnit * (std::abs(r.lse) + std::abs(r.top) + spread);
      for (std::int64_t d = 0; d < dv; ++d) {
        double value = 0, bound = 0;
        for (std::int64_t j = 0; j < c_.keys; ++j) {
          if (r.p[j] == 0) continue;
          const double term = r.p[j] * v_[offset(b, c_.key_heads, h / group(), c_.keys, j, dv) + d];
          value += term;
          bound += (r.e_p[j] + gamma(kLongestSum)) * std::abs(term);
        }
        want.out.value[at * dv + d] = value;
        want.out.bound[at * dv + d] = bound + rounding(c_.dtype, value);
      }
    });
  }

  // From O and LSE as a backward pass gets them: O rounded to its dtype, LSE to FP32.
  void backward(Expected& want, const std::vector<double>& out, const std::vector<double>& dout) const {
    const std::int64_t dv = c_.dv(), dim = c_.dim;
    want.dq = Quantity(static_cast<std::int64_t>(q_.size()));
    want.dk = Quantity(c_.batch * c_.key_heads * c_.keys * dim);
    want.dv = Quantity(c_.batch * c_.key_heads * c_.keys * dv);
    const double sum_q = gamma(c_.keys), sum_k = gamma(c_.queries * group());
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const Row r = row(b, h, i);
      if (r.top == -kInfinity) return;
      const std::int64_t row_at = offset(b, c_.query_heads, h, c_.queries, i, 1), g = h / group();
      double delta = 0, e_delta = 0;  // sum_c dout o; what rounding O to its dtype and summing do to it
      for (std::int64_t d = 0; d < dv; ++d) {
        const double o = want.out.value[row_at * dv + d], grad = dout[row_at * dv + d];
        delta += grad * o;
        e_delta += std::abs(grad) * (std::abs(out[row_at * dv + d] - o) + gamma(dv) * std::abs(o));
      }
      for (std::int64_t j = 0; j < c_.keys; ++j) {
        if (r.p[j] == 0) continue;
        const std::int64_t key_at = offset(b, c_.key_heads, g, c_.keys, j, 1);
        double dp = 0, dp_size = 0;
        // p = exp(s - lse), from an lse that was rounded.
        const double e_p = r.e_s[j] + 2 * kExp + kUnit * (std::abs(r.s[j]) + 2 * std::abs(r.lse));
        for (std::int64_t d = 0; d < dv; ++d) {
          const double grad = dout[row_at * dv + d], value = v_[key_at * dv + d];
          dp += grad * value, dp_size += std::abs(grad * value);
          want.dv.value[key_at * dv + d] += r.p[j] * grad;
          want.dv.bound[key_at * dv + d] += r.p[j] * std::abs(grad) * (e_p + sum_k);
        }
        const double ds = scale() * r.p[j] * (dp - delta);
        const double e_ds = (e_p + 3 * kUnit) * std::abs(ds) +
                            std::abs(scale()) * r.p[j] * (gamma(dv) * dp_size + e_delta + kUnit * std::abs(dp - delta));
        for (std::int64_t d = 0; d < dim; ++d) {
          const double q = q_[row_at * dim + d], k = k_[key_at * dim + d];
          want.dq.value[row_at * dim + d] += ds * k;
          want.dq.bound[row_at * dim + d] += std::abs(k) * (e_ds + sum_q * std::abs(ds));
          want.dk.value[key_at * dim + d] += ds * q;
          want.dk.bound[key_at * dim + d] += std::abs(q) * (e_ds + sum_k * std::abs(ds));
        }
      }
    });
    for (Quantity* quantity : {&want.dq, &want.dk, &want.dv})
      for (std::size_t x = 0; x < quantity->value.size(); ++x)
        quantity->bound[x] += rounding(c_.dtype, quantity->value[x]);
  }

 private:
  std::int64_t group() const { return c_.key_heads == 0 ? 0 : c_.query_heads / c_.key_heads; }
  double scale() const { return c_.scale.value_or(1 / std::sqrt(static_cast<double>(c_.dim))); }

  static std::int64_t offset(std::int64_t b, std::int64_t heads, std::int64_t h, std::int64_t tokens, std::int64_t n,
                             std::int64_t dim) {
    return ((b * heads + h) * tokens + n) * dim;
  }

  double mask_term(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    if (mask_.empty()) return 0;
    const std::int64_t* shape = args_.mask.shape;
    const std::int64_t at =
        offset(b % shape[0], shape[1], h % shape[1], shape[2], i % shape[2], shape[3]) + j % shape[3];
    if (args_.mask.dtype == ADAATTN_BOOL) return mask_[at] != 0 ? 0 : -kInfinity;
    return mask_[at];
  }

  template <typename Function>
  void for_each_row(Function&& visit) const {
    for (std::int64_t b = 0; b < c_.batch; ++b)
      for (std::int64_t h = 0; h < c_.query_heads; ++h)
        for (std::int64_t i = 0; i < c_.queries; ++i) visit(b, h, i);
  }

  const cases::Case& c_;
  const ForwardArgs& args_;
  std::vector<double> q_, k_, v_, mask_;
};

}  // namespace

const Expected& expect(const cases::Case& c, const Problem& problem, const ForwardArgs& args, bool gradients) {
  static std::map<std::string, Expected> known;
  const auto [found, is_new] = known.try_emplace(c.name + (gradients ? ", gradients" : ""));
  Expected& want = found->second;
  if (!is_new) return want;
  const Analysis analysis(c, problem, args);
  analysis.forward(want);
  if (gradients) analysis.backward(want, problem.out.values(), problem.dout.values());
  return want;
}

HeadError head_error(const Quantity& want, const std::vector<double>& got, std::int64_t head, std::int64_t head_size) {
  double error = 0, allowed = 0, norm = 0;
  for (std::int64_t x = head * head_size; x < (head + 1) * head_size; ++x) {
    error += (got[x] - want.value[x]) * (got[x] - want.value[x]);
    allowed += want.bound[x] * want.bound[x];
    norm += want.value[x] * want.value[x];
  }
  return {.error = std::sqrt(error / norm), .allowed = std::sqrt(allowed / norm)};
}

std::string complaint(const char* name, const Quantity& want, const std::vector<double>& got, std::int64_t head_size) {
  std::ostringstream text;
  if (got.size() != want.value.size()) {
    text << name << " has " << got.size() << " elements, expected " << want.value.size();
    return text.str();
  }
  double worst = 1;
  std::int64_t at = -1;
  for (std::size_t x = 0; x < got.size(); ++x) {
    const double error = got[x] == want.value[x] ? 0 : std::abs(got[x] - want.value[x]);
    const double ratio = error == 0 ? 0 : error / want.bound[x];
    if (!(ratio <= worst)) {  // NaN counts
      worst = ratio;
      at = static_cast<std::int64_t>(x);
    }
  }
  if (at < 0) return "";
  text << name << "[" << at / head_size << " (head), " << at % head_size << "] is " << got[at] << ", expected "
       << want.value[at] << " within " << want.bound[at] << "; ";
  const HeadError head = head_error(want, got, at / head_size, head_size);
  text << "the head's relative Frobenius error is " << head.error << ", allowed " << head.allowed;
  return text.str();
}

}  // namespace adaattn::testing
