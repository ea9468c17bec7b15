// The kernel table: order, forcing one, the reasons of those that decline, and what describe says of them.
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "dispatch/kernel_table.h"
#include "problem.h"

namespace adaattn::testing {
namespace {

const cases::Case kPlain = {.name = "plain", .dim = 64};

TEST(KernelTable, EndsWithTheReferenceAndHasNoNameTwice) {
  const auto check = [](auto table) {
    std::set<std::string> names;
    for (const auto& kernel : table) {
      EXPECT_TRUE(names.insert(kernel.name).second) << kernel.name << " is there twice";
      EXPECT_STRNE(kernel.summary, "");
    }
    ASSERT_FALSE(table.empty());
    EXPECT_STREQ(table.back().name, "reference_fp64");
  };
  check(forward_kernels());
  check(backward_kernels());
}

TEST(KernelTable, TheReferenceTakesEveryCaseOnTheCpu) {
  for (const cases::Case& c : cases::correctness()) {
    Problem problem(c);
    ForwardArgs args = problem.forward_args();
    args.options.kernel = "reference_fp64";
    EXPECT_STREQ(choose(args).name, "reference_fp64") << c.name;
  }
}

TEST(KernelTable, AnOptionForcesEveryKernelThatTakesTheProblem) {
  Problem problem(kPlain);
  for (const ForwardKernel& kernel : forward_kernels()) {
    ForwardArgs args = problem.forward_args();
    if (kernel.device != ADAATTN_CPU || !kernel.unavailable().empty() || !kernel.declines(args).empty()) continue;
    args.options.kernel = kernel.name;
    EXPECT_STREQ(choose(args).name, kernel.name);
  }
}

// A problem that every fast kernel declines still says why, kernel by kernel.
TEST(KernelTable, RefusalListsTheReasons) {
  cases::Case c = kPlain;
  c.dim = 3000;
  c.queries = c.keys = 2;
  Problem problem(c);
  for (const ForwardKernel& kernel : forward_kernels()) {
    ForwardArgs args = problem.forward_args();
    if (kernel.device != ADAATTN_CPU || kernel.declines(args).empty()) continue;
    args.options.kernel = kernel.name;
    std::size_t bytes = 0;
    EXPECT_EQ(adaattn_forward_workspace(&args, &bytes), ADAATTN_UNSUPPORTED);
    const std::string message = adaattn_last_error();
    EXPECT_NE(message.find("no kernel takes q [1, 2, 2, 3000] float32 on cpu"), std::string::npos) << message;
    for (const char* reason : kernel.declines(args)) EXPECT_NE(message.find(reason), std::string::npos) << message;
  }
}

TEST(KernelTable, BackwardUnknownNameListsThoseThatExist) {
  Problem problem(kPlain);
  BackwardArgs args = problem.backward_args();
  args.options.kernel = "nothing";
  std::size_t bytes = 0;
  EXPECT_EQ(adaattn_backward_workspace(&args, &bytes), ADAATTN_INVALID_ARGUMENT);
  for (const BackwardKernel& kernel : backward_kernels())
    EXPECT_NE(std::string(adaattn_last_error()).find(kernel.name), std::string::npos);
}

TEST(Reasons, KeepsThoseThatHold) {
  const Reasons reasons = Reasons().unless(true, "not this").unless(false, "this").unless(false, "and this");
  EXPECT_EQ(std::vector<std::string>(reasons.begin(), reasons.end()), (std::vector<std::string>{"this", "and this"}));
  EXPECT_TRUE(Reasons().empty());
  Reasons many;
  for (int i = 0; i < 20; ++i) many.unless(false, "more than fit");
  EXPECT_EQ(many.end() - many.begin(), 8);
}

// Just enough of a JSON reader to see whether a text is one JSON value.
class Json {
 public:
  static bool valid(const std::string& text) {
    Json json(text);
    return json.value() && json.at_ == text.size();
  }

 private:
  explicit Json(const std::string& text) : text_(text) {}
  void space() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  bool take(char c) {
    space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool word(const char* w) {
    if (text_.compare(at_, std::string(w).size(), w) != 0) return false;
    at_ += std::string(w).size();
    return true;
  }
  bool string() {
    if (!take('"')) return false;
    for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) return false;
      if (text_[at_] == '\\') ++at_;
    }
    return take('"');
  }
  template <typename Item>
  bool list(char close, Item&& item) {
    if (take(close)) return true;
    do {
      if (!item()) return false;
    } while (take(','));
    return take(close);
  }
  bool value() {
    space();
    if (at_ >= text_.size()) return false;
    if (text_[at_] == '"') return string();
    if (take('[')) return list(']', [this] { return value(); });
    if (take('{')) return list('}', [this] { return string() && take(':') && value(); });
    if (word("true") || word("false") || word("null")) return true;
    const std::size_t start = at_;
    while (at_ < text_.size() && std::string("-+.eE0123456789").find(text_[at_]) != std::string::npos) ++at_;
    return at_ > start;
  }
  const std::string& text_;
  std::size_t at_ = 0;
};

TEST(Describe, IsJsonThatNamesEveryKernel) {
  const std::string text = describe();
  EXPECT_TRUE(Json::valid(text)) << text;
  for (const ForwardKernel& kernel : forward_kernels()) EXPECT_NE(text.find(kernel.name), std::string::npos);
  for (const char* key : {"\"version\"", "\"instruction_sets\"", "\"cuda_devices\"", "\"backward\""})
    EXPECT_NE(text.find(key), std::string::npos) << text;
  EXPECT_EQ(text.find("\"chosen\""), std::string::npos);
}

TEST(Describe, NamesTheKernelThatAProblemGets) {
  Problem problem(kPlain);
  const ForwardArgs args = problem.forward_args();
  const std::string text = describe(&args);
  EXPECT_TRUE(Json::valid(text)) << text;
  EXPECT_NE(text.find(std::string("\"chosen\": \"") + choose(args).name + "\""), std::string::npos) << text;
  EXPECT_NE(text.find("\"declines\""), std::string::npos);
}

TEST(Describe, CutsAtTheCapacityAndTellsWhatItNeeds) {
  const std::string whole = describe();
  std::size_t needed = 0;
  std::vector<char> small(11, '#');
  ASSERT_EQ(adaattn_describe(nullptr, small.data(), 10, &needed), ADAATTN_OK);
  EXPECT_EQ(needed, whole.size() + 1);
  EXPECT_EQ(std::string(small.data()), whole.substr(0, 9));
  EXPECT_EQ(small[10], '#');
}

TEST(Describe, RefusesAMalformedProblem) {
  Problem problem(kPlain);
  ForwardArgs args = problem.forward_args();
  args.q.shape[3] = 0;
  EXPECT_THROW(describe(&args), Error);
}

TEST(Version, IsThatOfTheProjectAndTheHeader) {
  EXPECT_STREQ(adaattn_version(), ADAATTN_TEST_VERSION);
  EXPECT_EQ(adaattn_abi_version(), static_cast<std::uint32_t>(ADAATTN_ABI_VERSION));
}

}  // namespace
}  // namespace adaattn::testing
