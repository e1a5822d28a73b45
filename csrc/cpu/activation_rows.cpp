// SPDX-License-Identifier: Apache-2.0
// Puts rows of x into the order in which the linear kernels read them. One stream for a block of rows
// also keeps rows that are 4 KB apart from evicting each other from L1.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// What the linear kernels of this level multiply by.
template <typename T>
struct Packed {
  using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Packed<BFloat16> {
  using Type = BFloat16;
};
#endif

MOSAIC_HD void convert(float from, float* to) { *to = from; }
MOSAIC_HD void convert(BFloat16 from, BFloat16* to) { *to = from; }
MOSAIC_HD void convert(BFloat16 from, float* to) { *to = to_float(from); }
MOSAIC_HD void convert(Half from, float* to) { *to = to_float(from); }

}  // namespace

int packed_x_size(DType dtype) {
  return dtype == DType::kBFloat16 ? static_cast<int>(sizeof(Packed<BFloat16>::Type)) : 4;
}

template <typename T>
void pack_x(const void* from, int64_t rows, int64_t in_features, void* packed) {
  using X = typename Packed<T>::Type;
  const int64_t words = bitmask_words(in_features), whole = in_features / kWordBits;
  for (int64_t n = 0; n < rows; ++n) {
    const T* x = static_cast<const T*>(from) + n * in_features;
    X* to = static_cast<X*>(packed) + n * kWordBits;
    for (int64_t w = 0; w < whole; ++w, x += kWordBits, to += rows * kWordBits) {
      for (int i = 0; i < kWordBits; ++i) convert(x[i], to + i);
    }
    if (whole == words) continue;
    const int64_t left = in_features - whole * kWordBits;
    std::memset(to, 0, kWordBits * sizeof(X));
    for (int64_t i = 0; i < left; ++i) convert(x[i], to + i);
  }
}

template void pack_x<float>(const void*, int64_t, int64_t, void*);
template void pack_x<BFloat16>(const void*, int64_t, int64_t, void*);
template void pack_x<Half>(const void*, int64_t, int64_t, void*);

}  // namespace mosaic::MOSAIC_ISA
