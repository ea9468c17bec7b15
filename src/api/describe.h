// What this build and this machine can do, as JSON.
#pragma once

#include <string>

#include "adaattn/adaattn.h"

namespace adaattn {

// args (validated) adds each kernel's reasons for declining that problem, and which one is chosen; may be null.
std::string describe_json(const adaattn_forward_args* args);

}  // namespace adaattn
