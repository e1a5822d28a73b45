// SPDX-License-Identifier: Apache-2.0
// Portable C++: one weight row after the other, its set bits in order.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {

template <typename T>
void linear(const LinearTask& task, int64_t begin, int64_t end) {
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t n = 0; n < a.rows; ++n) {
      const int64_t block = n / kRowBlock * kRowBlock;
      const int64_t stride = (a.rows - block < kRowBlock ? a.rows - block : kRowBlock) * kWordBits;
      const float* x =
          static_cast<const float*>(task.x) + block * words * kWordBits + (n - block) * kWordBits;
      const T* value = static_cast<const T*>(a.values) + a.offsets[r];
      float sum = 0;
      for (int64_t w = 0; w < words; ++w, x += stride) {
        for (uint32_t bits = a.words[r * words + w]; bits; bits &= bits - 1) {
          sum += to_float(*value++) * x[__builtin_ctz(bits)];
        }
      }
      store(bias ? sum + to_float(bias[r]) : sum, static_cast<T*>(a.out) + n * a.out_features + r);
    }
  }
}

template void linear<float>(const LinearTask&, int64_t, int64_t);
template void linear<BFloat16>(const LinearTask&, int64_t, int64_t);
template void linear<Half>(const LinearTask&, int64_t, int64_t);

}  // namespace mosaic::MOSAIC_ISA
