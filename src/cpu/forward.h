// Exact forward attention on the CPU: tiles of keys, queries along the vector lanes, online softmax.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::cpu {

std::size_t forward_workspace(const adaattn_forward_args& args);
void forward(const adaattn_forward_args& args);

struct ForwardPlan;
struct ForwardScratch;
// One task of a plan, for those who schedule tasks themselves.
void run_forward_task(const ForwardPlan& plan, std::int64_t task, const ForwardScratch& scratch);

}  // namespace adaattn::cpu
