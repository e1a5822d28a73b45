// SPDX-License-Identifier: Apache-2.0
// Portable C++: one weight row after the other, the set bits of each word in order.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

MOSAIC_HD float to_float(int8_t v) { return v; }

// V: what a value is stored as.
template <typename T, typename V>
void multiply(const LinearTask& task, int64_t begin, int64_t end) {
  using cpu::to_float;
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t n = 0; n < a.rows; ++n) {
      const int64_t block = n / kRowBlock * kRowBlock;
      const int64_t stride = (a.rows - block < kRowBlock ? a.rows - block : kRowBlock) * kWordBits;
      const float* x =
          static_cast<const float*>(task.x) + block * words * kWordBits + (n - block) * kWordBits;
      const V* value = static_cast<const V*>(a.values) + a.offsets[r];
      float sum = 0;
      for (int64_t w = 0; w < words; ++w, x += stride) {
        float part = 0;
        for (uint32_t bits = a.words[r * words + w]; bits; bits &= bits - 1) {
          part += to_float(*value++) * x[__builtin_ctz(bits)];
        }
        sum +=
            a.scale_groups > 1 ? part * a.scales[r * a.scale_groups + w * kWordBits / kScaleColumns] : part;
      }
      if (a.scale_groups == 1) sum *= a.scales[r];
      if (task.x_scales) sum *= task.x_scales[n];
      store(bias ? sum + to_float(bias[r]) : sum, static_cast<T*>(a.out) + n * a.out_features + r);
    }
  }
}

}  // namespace

template <typename T>
void linear(const LinearTask& task, int64_t begin, int64_t end) {
  multiply<T, T>(task, begin, end);
}

template <typename T>
void linear_int8(const LinearTask& task, int64_t begin, int64_t end) {
  multiply<T, int8_t>(task, begin, end);
}

#define MOSAIC_INSTANTIATE(T)                                   \
  template void linear<T>(const LinearTask&, int64_t, int64_t); \
  template void linear_int8<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
