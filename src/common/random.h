// Random numbers by place instead of by sequence, so that threads and instruction sets do not change them.
#pragma once

#include <cmath>
#include <cstdint>

namespace adaattn {

// SplitMix64's output function (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195) of seed and index.
inline std::uint64_t random_bits(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15U;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

// In (0, 1).
inline double random_uniform(std::uint64_t seed, std::uint64_t index) {
  return (static_cast<double>(random_bits(seed, index) >> 11) + 0.5) * 0x1p-53;
}

// Standard normal (Box and Muller).
inline double random_normal(std::uint64_t seed, std::uint64_t index) {
  const double radius = std::sqrt(-2 * std::log(random_uniform(seed, 2 * index)));
  return radius * std::cos(6.283185307179586 * random_uniform(seed, 2 * index + 1));
}

}  // namespace adaattn
