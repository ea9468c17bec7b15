#include "cpu/quantized.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quantized.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "cpu/simd/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {
namespace {

constexpr float kLargest = 127;

// visit(column, vector tag) over all columns, whole vectors first.
template <class Visit>
HWY_INLINE void for_each_column(std::size_t columns, Visit visit) {
  const FloatTag d;
  const hn::CappedTag<float, 1> one;
  std::size_t c = 0;
  for (; c + kVectorLanes <= columns; c += kVectorLanes) visit(c, d);
  for (; c < columns; ++c) visit(c, one);
}

void keys_to_int8(const float* k, std::size_t ld, std::size_t dim, std::size_t count, std::uint8_t* to, float* scales) {
  const FloatTag d;
  for (std::size_t row = 0; row < count; ++row, k += ld, to += whole(dim, 4)) {
    FloatVector largest_of = hn::Zero(d);
    float largest = 0;
    std::size_t c = 0;
    for (; c + kVectorLanes <= dim; c += kVectorLanes) largest_of = hn::Max(largest_of, hn::Abs(hn::LoadU(d, k + c)));
    for (; c < dim; ++c) largest = std::max(largest, std::abs(k[c]));
    largest = std::max(largest, hn::GetLane(hn::MaxOfLanes(d, largest_of)));
    const float inverse = largest > 0 ? kLargest / largest : 0;
    scales[row] = largest / kLargest;
    for_each_column(dim, [&](std::size_t at, auto tag) HWY_ATTR {
      const hn::RebindToSigned<decltype(tag)> di;
      const hn::Rebind<std::uint8_t, decltype(tag)> d8;
      const auto value = hn::NearestInt(hn::Mul(hn::LoadU(tag, k + at), hn::Set(tag, inverse)));
      hn::StoreU(hn::DemoteTo(d8, hn::Add(value, hn::Set(di, 128))), d8, to + at);
    });
    for (c = dim; c < whole(dim, 4); ++c) to[c] = 128;
  }
}

// Groups of kGroup rows beside each other, by column; rows beyond count are 0.
template <std::size_t kGroup, class Pack>
HWY_INLINE void group_rows(const float* v, std::size_t ld, std::size_t dim, std::size_t count, std::int32_t* to,
                           Pack pack) {
  for (std::size_t first = 0; first < static_cast<std::size_t>(kClassTile); first += kGroup, to += dim)
    for_each_column(dim, [&](std::size_t c, auto tag) HWY_ATTR {
      const auto value = [&](std::size_t i) HWY_ATTR {
        return first + i < count ? hn::LoadU(tag, v + (first + i) * ld + c) : hn::Zero(tag);
      };
      pack(c, tag, first, value, to + c);
    });
}

void values_to_int8(const float* v, std::size_t ld, std::size_t dim, const float* mean, std::size_t count,
                    std::int8_t* to, float* scales) {
  for_each_column(dim, [&](std::size_t c, auto tag) HWY_ATTR {
    const auto centre = hn::LoadU(tag, mean + c);
    auto largest = hn::Zero(tag);
    for (std::size_t row = 0; row < count; ++row)
      largest = hn::Max(largest, hn::Abs(hn::Sub(hn::LoadU(tag, v + row * ld + c), centre)));
    hn::StoreU(hn::Div(largest, hn::Set(tag, kLargest)), tag, scales + c);
  });
  group_rows<4>(v, ld, dim, count, reinterpret_cast<std::int32_t*>(to),
                [&](std::size_t c, auto tag, std::size_t first, auto value, std::int32_t* quad) HWY_ATTR {
                  const hn::RebindToSigned<decltype(tag)> di;
                  const auto centre = hn::LoadU(tag, mean + c);
                  const auto inverse =
                      hn::Div(hn::Set(tag, 1.0F), hn::Max(hn::LoadU(tag, scales + c), hn::Set(tag, 1e-37F)));
                  const auto byte = [&](std::size_t i) HWY_ATTR {
                    if (first + i >= count) return hn::Zero(di);
                    return hn::And(hn::NearestInt(hn::Mul(hn::Sub(value(i), centre), inverse)), hn::Set(di, 0xFF));
                  };
                  hn::StoreU(hn::Or(hn::Or(byte(0), hn::ShiftLeft<8>(byte(1))),
                                    hn::Or(hn::ShiftLeft<16>(byte(2)), hn::ShiftLeft<24>(byte(3)))),
                             di, quad);
                });
}

template <class Tag, class V>
HWY_INLINE auto rounded_bits(Tag /*tag*/, V value) {  // a bfloat16 in the upper half; half way goes up
  const hn::RebindToUnsigned<Tag> du;
  return hn::Add(hn::BitCast(du, value), hn::Set(du, 0x8000U));
}

void keys_to_bfloat16(const float* k, std::size_t ld, std::size_t dim, std::size_t count, std::uint16_t* to) {
  for (std::size_t row = 0; row < count; ++row, k += ld, to += whole(dim, 2)) {
    for_each_column(dim, [&](std::size_t c, auto tag) HWY_ATTR {
      const hn::RebindToSigned<decltype(tag)> di;
      const hn::Rebind<std::uint16_t, decltype(tag)> d16;
      const auto upper = hn::ShiftRight<16>(rounded_bits(tag, hn::LoadU(tag, k + c)));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, upper)), d16, to + c);
    });
    if (dim % 2 != 0) to[dim] = 0;
  }
}

void values_to_bfloat16(const float* v, std::size_t ld, std::size_t dim, std::size_t count, std::int32_t* to) {
  group_rows<2>(v, ld, dim, count, to, [](std::size_t, auto tag, std::size_t, auto value, std::int32_t* pair) HWY_ATTR {
    const hn::RebindToUnsigned<decltype(tag)> du;
    const hn::RebindToSigned<decltype(tag)> di;
    const auto low = hn::ShiftRight<16>(rounded_bits(tag, value(0)));
    const auto high = hn::And(rounded_bits(tag, value(1)), hn::Set(du, 0xFFFF0000U));
    hn::StoreU(hn::BitCast(di, hn::Or(low, high)), di, pair);
  });
}

}  // namespace

void copy_keys(const float* k, std::size_t ld, std::size_t dim, std::size_t first, std::size_t count, Copies copies,
               const Quantized& to) {
  if (copies.int8) keys_to_int8(k, ld, dim, count, to.k8 + first * whole(dim, 4), to.k8_scale + first);
  if (copies.bfloat16) keys_to_bfloat16(k, ld, dim, count, to.k16 + first * whole(dim, 2));
}

void copy_values(const float* v, std::size_t ld, std::size_t dim, const float* mean, std::size_t first,
                 std::size_t count, Copies copies, const Quantized& to) {
  if (copies.int8)
    values_to_int8(v, ld, dim, mean, count, to.v8 + first * dim,
                   to.v8_scale + first / static_cast<std::size_t>(kClassTile) * dim);
  if (copies.bfloat16) values_to_bfloat16(v, ld, dim, count, reinterpret_cast<std::int32_t*>(to.v16 + first * dim));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn::cpu {

HWY_EXPORT(copy_keys);
HWY_EXPORT(copy_values);

void quantize_keys(const float* k, std::size_t ld, std::size_t dim, std::size_t first, std::size_t count, Copies copies,
                   const Quantized& to) {
  HWY_DYNAMIC_DISPATCH(copy_keys)(k, ld, dim, first, count, copies, to);
}

void quantize_values(const float* v, std::size_t ld, std::size_t dim, const float* mean, std::size_t first,
                     std::size_t count, Copies copies, const Quantized& to) {
  HWY_DYNAMIC_DISPATCH(copy_values)(v, ld, dim, mean, first, count, copies, to);
}

}  // namespace adaattn::cpu
#endif
