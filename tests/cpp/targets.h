// Every kernel of the table together with every instruction set of this machine, as a test parameter.
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cases.h"
#include "dispatch/kernel_table.h"

namespace adaattn::testing {

struct Candidate {
  const char* kernel;
  std::int64_t target;  // a Highway target; 0: the kernel does not depend on it
};

template <typename Args>
std::vector<Candidate> candidates(std::span<const Kernel<Args>> table) {
  std::vector<Candidate> all;
  for (const auto& kernel : table) {
    if (kernel.device != ADAATTN_CPU) continue;
    const std::string_view name = kernel.name;
    // Not exact, with tests of their own.
    if (name == "cpu_adaptive" || name == "cpu_bounded" || name == "cpu_tiled") continue;
    if (std::string_view(kernel.name) == "reference_fp64")
      all.push_back({kernel.name, 0});
    else
      for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) all.push_back({kernel.name, target});
  }
  return all;
}

// Makes Highway's run-time choice see one instruction set only, while it lives.
class OnlyTarget {
 public:
  explicit OnlyTarget(std::int64_t target) { restrict_to(target); }
  ~OnlyTarget() { restrict_to(0); }
  OnlyTarget(const OnlyTarget&) = delete;
  OnlyTarget& operator=(const OnlyTarget&) = delete;

 private:
  static void restrict_to(std::int64_t target) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

using KernelCase = std::tuple<Candidate, cases::Case>;

inline std::string name_of(const Candidate& candidate) {
  return candidate.kernel + (candidate.target == 0 ? "" : std::string("_") + hwy::TargetName(candidate.target));
}
inline std::string case_name(const ::testing::TestParamInfo<KernelCase>& info) {
  return name_of(std::get<Candidate>(info.param)) + "_" + std::get<cases::Case>(info.param).name;
}

inline void PrintTo(const Candidate& candidate, std::ostream* stream) { *stream << candidate.kernel; }

}  // namespace adaattn::testing

namespace adaattn::cases {
inline void PrintTo(const Case& c, std::ostream* stream) { *stream << c.name; }
}  // namespace adaattn::cases
