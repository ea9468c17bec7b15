// The 16-bit conversions, over every bit pattern and every neighbourhood of a rounding boundary, against the
// hardware's.
#include "common/dtype.h"

#include <gtest/gtest.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace adaattn {
namespace {

#if defined(__x86_64__)
__attribute__((target("f16c"))) std::uint16_t by_hardware(float value) {
  return static_cast<std::uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
}
bool have_hardware() { return __builtin_cpu_supports("avx2") != 0; }  // every processor with AVX2 has F16C
#else
std::uint16_t by_hardware(float) { return 0; }
bool have_hardware() { return false; }
#endif

float half_value(std::uint16_t bits) {  // by the definition of binary16
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction != 0 ? std::numeric_limits<float>::quiet_NaN()
                                                           : std::numeric_limits<float>::infinity())
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

TEST(Float16, EveryPatternHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float value = float16_to_float(static_cast<std::uint16_t>(bits));
    ASSERT_TRUE(same(value, half_value(static_cast<std::uint16_t>(bits)))) << std::hex << bits;
    if (std::isnan(value))
      ASSERT_TRUE(std::isnan(float16_to_float(float_to_float16(value)))) << std::hex << bits;
    else
      ASSERT_EQ(float_to_float16(value), bits) << std::hex << bits;
  }
}

TEST(BFloat16, EveryPatternHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float value = bfloat16_to_float(static_cast<std::uint16_t>(bits));
    ASSERT_EQ(std::bit_cast<std::uint32_t>(value) >> 16, bits) << std::hex << bits;
    if (std::isnan(value))
      ASSERT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(value)))) << std::hex << bits;
    else
      ASSERT_EQ(float_to_bfloat16(value), bits) << std::hex << bits;
  }
}

// Between two neighbours: just below the middle goes down, just above up, the middle to the even one.
template <typename ToFloat, typename FromFloat>
void check_rounding(ToFloat to_float, FromFloat from_float, std::uint16_t infinity) {
  const float largest = std::numeric_limits<float>::max();
  for (std::uint16_t bits = 0; bits < infinity; ++bits) {
    const double low = to_float(bits);
    const double high = bits + 1 == infinity ? 2 * low - to_float(static_cast<std::uint16_t>(bits - 1))
                                             : to_float(static_cast<std::uint16_t>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);  // exact: one more bit than the 16-bit type has
    const auto even = static_cast<std::uint16_t>(bits % 2 == 0 ? bits : bits + 1);
    const auto up = static_cast<std::uint16_t>(bits + 1);
    ASSERT_EQ(from_float(middle), even) << std::hex << bits;
    ASSERT_EQ(from_float(std::nextafter(middle, 0.0f)), bits) << std::hex << bits;
    ASSERT_EQ(from_float(std::nextafter(middle, largest)), up) << std::hex << bits;
    ASSERT_EQ(from_float(-middle), even | 0x8000) << std::hex << bits;
  }
}

TEST(Float16, RoundsToNearestEven) { check_rounding(float16_to_float, float_to_float16, 0x7C00); }
TEST(BFloat16, RoundsToNearestEven) { check_rounding(bfloat16_to_float, float_to_bfloat16, 0x7F80); }

// The processor's own conversion, over floats of every exponent and sign: every 4,001st pattern, about a million.
TEST(Float16, AgreesWithTheHardware) {
  if (!have_hardware()) GTEST_SKIP() << "this processor has no F16C";
  for (std::uint64_t bits = 0; bits <= 0xFFFFFFFFu; bits += 4001) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(float_to_float16(value), by_hardware(value)) << value;
  }
}

TEST(Float16, OverflowBecomesInfinityAndNaNStays) {
  EXPECT_EQ(float_to_float16(65519.996f), 0x7BFF);
  EXPECT_EQ(float_to_float16(65520.0f), 0x7C00);
  EXPECT_EQ(float_to_float16(-1e30f), 0xFC00);
  EXPECT_EQ(float_to_float16(std::numeric_limits<float>::infinity()), 0x7C00);
  EXPECT_TRUE(std::isnan(float16_to_float(float_to_float16(-std::numeric_limits<float>::quiet_NaN()))));
}

TEST(BFloat16, OverflowBecomesInfinityAndNaNStays) {
  EXPECT_EQ(float_to_bfloat16(std::numeric_limits<float>::max()), 0x7F80);
  // A NaN whose set bits are all in the half that is cut off.
  EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(std::bit_cast<float>(0x7F800001u)))));
}

TEST(Dtype, NamesAndSizes) {
  EXPECT_STREQ(dtype_name(ADAATTN_FLOAT32), "float32");
  EXPECT_STREQ(dtype_name(ADAATTN_FLOAT16), "float16");
  EXPECT_STREQ(dtype_name(ADAATTN_BFLOAT16), "bfloat16");
  EXPECT_STREQ(dtype_name(ADAATTN_BOOL), "bool");
  EXPECT_STREQ(dtype_name(17), "unknown");
  EXPECT_EQ(dtype_size(ADAATTN_FLOAT32), 4);
  EXPECT_EQ(dtype_size(ADAATTN_BFLOAT16), 2);
  EXPECT_EQ(dtype_size(ADAATTN_BOOL), 1);
}

TEST(Dtype, ElementsAreStoredAndLoadedInEveryDtype) {
  for (const std::int32_t dtype : {ADAATTN_FLOAT32, ADAATTN_FLOAT16, ADAATTN_BFLOAT16}) {
    std::array<float, 4> memory{};
    store_element(memory.data(), 1, dtype, -2.5f);
    EXPECT_EQ(load_element(memory.data(), 1, dtype), -2.5f);
    EXPECT_EQ(load_element(memory.data(), 0, dtype), 0.0f);
  }
}

}  // namespace
}  // namespace adaattn
