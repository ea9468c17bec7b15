// The one matrix product of the CPU kernels: a few rows of C held in registers, one panel of lanes wide; and any number
// of panels.
// Included once per instruction set (Highway's foreach_target), hence the toggled guard.
#if defined(ADAATTN_CPU_SIMD_MICRO_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_CPU_SIMD_MICRO_GEMM_INL_H_
#undef ADAATTN_CPU_SIMD_MICRO_GEMM_INL_H_
#else
#define ADAATTN_CPU_SIMD_MICRO_GEMM_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>

HWY_BEFORE_NAMESPACE();
namespace adaattn::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::RebindToSigned<FloatTag>;
using FloatVector = hn::Vec<FloatTag>;

// A panel is two vectors wide. kMicroRows accumulator pairs, the two vectors of B and a broadcast of A fit the
// registers: 16 on AVX2 and before, 32 on AVX-512 and NEON.
constexpr std::size_t kVectorLanes = hn::MaxLanes(FloatTag());
constexpr std::size_t kPanelLanes = 2 * kVectorLanes;
constexpr std::size_t kMicroRows = HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON ? 8 : 6;

// How A is laid out: element (row, k) is a[row * lda + k], or a[k * lda + row].
enum class ALayout { kRowMajor, kTransposed };

// C[row][lane] = sum over k < depth of A(row, k) * B[k * ldb + lane], for kRows rows and one panel of lanes.
// epilogue(row, low, high) receives the two vectors of each row, rows in order.
template <std::size_t kRows, ALayout kLayout, class Epilogue>
HWY_INLINE void micro_gemm(const float* HWY_RESTRICT a, std::size_t lda, const float* HWY_RESTRICT b, std::size_t ldb,
                           std::size_t depth, Epilogue& epilogue) {
  const FloatTag d;
  FloatVector low[kRows], high[kRows];
  for (std::size_t row = 0; row < kRows; ++row) low[row] = high[row] = hn::Zero(d);
  for (std::size_t k = 0; k < depth; ++k) {
    const FloatVector b_low = hn::LoadU(d, b + k * ldb), b_high = hn::LoadU(d, b + k * ldb + kVectorLanes);
    for (std::size_t row = 0; row < kRows; ++row) {
      const FloatVector value = hn::Set(d, kLayout == ALayout::kRowMajor ? a[row * lda + k] : a[k * lda + row]);
      low[row] = hn::MulAdd(value, b_low, low[row]);
      high[row] = hn::MulAdd(value, b_high, high[row]);
    }
  }
  for (std::size_t row = 0; row < kRows; ++row) epilogue(row, low[row], high[row]);
}

// The same for any number of rows; epilogue.at(first_row) makes the epilogue of a group that starts there.
template <ALayout kLayout, class EpilogueFactory>
HWY_INLINE void panel_gemm(std::size_t rows, const float* HWY_RESTRICT a, std::size_t lda, const float* HWY_RESTRICT b,
                           std::size_t ldb, std::size_t depth, EpilogueFactory& factory) {
  const std::size_t row_step = kLayout == ALayout::kRowMajor ? lda : 1;
  std::size_t row = 0;
  for (; row + kMicroRows <= rows; row += kMicroRows) {
    auto epilogue = factory.at(row);
    micro_gemm<kMicroRows, kLayout>(a + row * row_step, lda, b, ldb, depth, epilogue);
  }
  for (; row + 2 <= rows; row += 2) {
    auto epilogue = factory.at(row);
    micro_gemm<2, kLayout>(a + row * row_step, lda, b, ldb, depth, epilogue);
  }
  if (row < rows) {
    auto epilogue = factory.at(row);
    micro_gemm<1, kLayout>(a + row * row_step, lda, b, ldb, depth, epilogue);
  }
}

// Epilogue: C rows are stored, or added to what is there.
template <bool kAdd>
struct StoreRows {
  float* c;
  std::size_t ldc;
  HWY_INLINE StoreRows at(std::size_t row) const { return {c + row * ldc, ldc}; }
  HWY_INLINE void operator()(std::size_t row, FloatVector low, FloatVector high) const {
    const FloatTag d;
    float* to = c + row * ldc;
    if constexpr (kAdd) {
      low = hn::Add(hn::LoadU(d, to), low);
      high = hn::Add(hn::LoadU(d, to + kVectorLanes), high);
    }
    hn::StoreU(low, d, to);
    hn::StoreU(high, d, to + kVectorLanes);
  }
};

// C[rows][columns] = A B (or += with kAdd), columns a multiple of kPanelLanes.
template <ALayout kLayout, bool kAdd>
void product(std::size_t rows, const float* a, std::size_t lda, const float* b, std::size_t ldb, std::size_t depth,
             float* c, std::size_t ldc, std::size_t columns) {
  for (std::size_t lane = 0; lane < columns; lane += kPanelLanes) {
    StoreRows<kAdd> store{c + lane, ldc};
    panel_gemm<kLayout>(rows, a, lda, b + lane, ldb, depth, store);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::cpu
HWY_AFTER_NAMESPACE();

#endif
