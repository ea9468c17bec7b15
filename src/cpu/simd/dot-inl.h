// Dot products of short groups inside 32-bit lanes: four 8-bit integers, or two bfloat16.
#if defined(ADAATTN_CPU_SIMD_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_SIMD_DOT_INL_H_
#undef ADAATTN_CPU_SIMD_DOT_INL_H_
#else
#define ADAATTN_CPU_SIMD_DOT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>

#include "cpu/simd/micro_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

using IntVector = hn::Vec<IntTag>;

// Highway 1.0.3 knows neither vpdpbusd nor vdpbf16ps, hence the assembly; whether the machine has them is asked at run
// time (native_dots), and the other way gives the same integers, and bfloat16 sums that differ in rounding only.
struct NativeDots {
  bool int8, bfloat16;
};
inline NativeDots native_dots() {
#if HWY_TARGET == HWY_AVX3
  static const NativeDots dots = {__builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx512bf16") != 0};
  return dots;
#else
  return {false, false};
#endif
}

// sum[lane] += sum over i < 4 of unsigned_bytes[lane][i] * signed_bytes[lane][i]
template <bool kNative>
HWY_INLINE void add_byte_dots(IntVector& sum, IntVector unsigned_bytes, IntVector signed_bytes) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(unsigned_bytes.raw), "v"(signed_bytes.raw));
    return;
  }
#endif
  const IntTag d;
  const auto low = hn::Set(d, 0xFF);
  const auto add = [&](IntVector u, IntVector s) HWY_ATTR { sum = hn::Add(sum, hn::Mul(hn::And(u, low), s)); };
  add(unsigned_bytes, hn::ShiftRight<24>(hn::ShiftLeft<24>(signed_bytes)));
  add(hn::ShiftRight<8>(unsigned_bytes), hn::ShiftRight<24>(hn::ShiftLeft<16>(signed_bytes)));
  add(hn::ShiftRight<16>(unsigned_bytes), hn::ShiftRight<24>(hn::ShiftLeft<8>(signed_bytes)));
  add(hn::ShiftRight<24>(unsigned_bytes), hn::ShiftRight<24>(signed_bytes));
}

// sum[lane] += a[lane][0] * b[lane][0] + a[lane][1] * b[lane][1]
template <bool kNative>
HWY_INLINE void add_bfloat16_dots(FloatVector& sum, IntVector a, IntVector b) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
    return;
  }
#endif
  const FloatTag d;
  const auto upper = hn::Set(IntTag(), static_cast<std::int32_t>(0xFFFF0000U));
  sum = hn::MulAdd(hn::BitCast(d, hn::ShiftLeft<16>(a)), hn::BitCast(d, hn::ShiftLeft<16>(b)), sum);
  sum = hn::MulAdd(hn::BitCast(d, hn::And(a, upper)), hn::BitCast(d, hn::And(b, upper)), sum);
}

// 2 x bfloat16, rounded to nearest, half way up.
HWY_INLINE IntVector pack_bfloat16(FloatVector first, FloatVector second) {
  const IntTag d;
  const hn::RebindToUnsigned<IntTag> du;
  const auto half = hn::Set(d, 0x8000), upper = hn::Set(d, static_cast<std::int32_t>(0xFFFF0000U));
  const auto low = hn::ShiftRight<16>(hn::BitCast(du, hn::Add(hn::BitCast(d, first), half)));
  return hn::Or(hn::BitCast(d, low), hn::And(hn::Add(hn::BitCast(d, second), half), upper));
}

// 4 bytes of integers in -128..255.
HWY_INLINE IntVector pack_bytes(IntVector a, IntVector b, IntVector c, IntVector e) {
  const IntTag d;
  const auto low = hn::Set(d, 0xFF);
  return hn::Or(hn::Or(hn::And(a, low), hn::ShiftLeft<8>(hn::And(b, low))),
                hn::Or(hn::ShiftLeft<16>(hn::And(c, low)), hn::ShiftLeft<24>(e)));
}

// Operands of a product C[row][lane] = start + sum over k of A(row, k) . B[k][lane]: A's groups are broadcast, B's lie
// along the lanes.
template <bool kNative>
struct UnsignedRows {  // A of u8, B of s8
  using Sum = IntVector;
  static HWY_INLINE void add(Sum& sum, IntVector a, IntVector b) { add_byte_dots<kNative>(sum, a, b); }
};
template <bool kNative>
struct SignedRows {  // A of s8, B of u8
  using Sum = IntVector;
  static HWY_INLINE void add(Sum& sum, IntVector a, IntVector b) { add_byte_dots<kNative>(sum, b, a); }
};
template <bool kNative>
struct BFloat16Rows {
  using Sum = FloatVector;
  static HWY_INLINE void add(Sum& sum, IntVector a, IntVector b) { add_bfloat16_dots<kNative>(sum, a, b); }
};

// Groups of A: element (row, k) is a[row * row_step + k * group_step].
struct Groups {
  const std::int32_t* data;
  std::size_t row_step, group_step;
};

template <std::size_t kRows, class Dots, class Epilogue>
HWY_INLINE void micro_dots(const Groups& a, const std::int32_t* HWY_RESTRICT b, std::size_t groups,
                           Epilogue& epilogue) {
  const IntTag d;
  typename Dots::Sum low[kRows], high[kRows];
  for (std::size_t row = 0; row < kRows; ++row) {
    low[row] = epilogue.start_low();
    high[row] = epilogue.start_high();
  }
  for (std::size_t k = 0; k < groups; ++k) {
    const IntVector b_low = hn::LoadU(d, b + k * kPanelLanes),
                    b_high = hn::LoadU(d, b + k * kPanelLanes + kVectorLanes);
    for (std::size_t row = 0; row < kRows; ++row) {
      const IntVector value = hn::Set(d, a.data[row * a.row_step + k * a.group_step]);
      Dots::add(low[row], value, b_low);
      Dots::add(high[row], value, b_high);
    }
  }
  for (std::size_t row = 0; row < kRows; ++row) epilogue(row, low[row], high[row]);
}

// Any number of rows; factory.at(first_row) makes the epilogue of a group of rows that starts there.
template <class Dots, class EpilogueFactory>
HWY_INLINE void panel_dots(std::size_t rows, const Groups& a, const std::int32_t* HWY_RESTRICT b, std::size_t groups,
                           EpilogueFactory& factory) {
  std::size_t row = 0;
  for (; row + kMicroRows <= rows; row += kMicroRows) {
    auto epilogue = factory.at(row);
    micro_dots<kMicroRows, Dots>({a.data + row * a.row_step, a.row_step, a.group_step}, b, groups, epilogue);
  }
  for (std::size_t left = rows % kMicroRows; left != 0; --left, ++row) {
    auto epilogue = factory.at(row);
    micro_dots<1, Dots>({a.data + row * a.row_step, a.row_step, a.group_step}, b, groups, epilogue);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
