// Which keys the queries of one batch entry see, in 32 bits: what common/visibility.h says, for kernels that are short
// of registers. Tokens count less than 2^30.
#pragma once

namespace adaattn::cuda::sm80 {

struct Reach {
  int key_count, query_count;
  int begin, end;  // query 0 sees the keys [begin, end), as far as they exist; each further query one further on
  int sinks;       // first keys that all see whose window does not end before them
};

}  // namespace adaattn::cuda::sm80
