// Gram matrices of any number of panels, on the CPU kernels' micro kernel.
// Included once per instruction set (Highway's foreach_target), hence the toggled guard.
#if defined(ADAATTN_MEASURE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_MEASURE_PRODUCTS_INL_H_
#undef ADAATTN_MEASURE_PRODUCTS_INL_H_
#else
#define ADAATTN_MEASURE_PRODUCTS_INL_H_
#endif

#include <cstddef>

#include "cpu/simd/micro_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn::measure {
namespace HWY_NAMESPACE {

using cpu::HWY_NAMESPACE::ALayout;
using cpu::HWY_NAMESPACE::kPanelLanes;
using cpu::HWY_NAMESPACE::product;

// The upper triangle, diagonal included and some of what lies below it, of X^T X for rows x [depth][ld].
inline void upper_gram(const float* x, std::size_t ld, std::size_t depth, float* c, std::size_t ldc,
                       std::size_t columns) {
  for (std::size_t lane = 0; lane < columns; lane += kPanelLanes) {
    cpu::HWY_NAMESPACE::StoreRows<false> store{c + lane, ldc};
    cpu::HWY_NAMESPACE::panel_gemm<ALayout::kTransposed>(lane + kPanelLanes, x, ld, x + lane, ld, depth, store);
  }
}

// to += from over the upper triangle of the first dim columns and rows.
inline void add_upper(const float* from, std::size_t from_ld, std::size_t dim, double* to, std::size_t to_ld) {
  for (std::size_t r = 0; r < dim; ++r)
    for (std::size_t c = r; c < dim; ++c) to[r * to_ld + c] += static_cast<double>(from[r * from_ld + c]);
}

inline void mirror(double* matrix, std::size_t dim) {
  for (std::size_t r = 0; r < dim; ++r)
    for (std::size_t c = 0; c < r; ++c) matrix[r * dim + c] = matrix[c * dim + r];
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn::measure
HWY_AFTER_NAMESPACE();

#endif
