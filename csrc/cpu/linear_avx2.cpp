// SPDX-License-Identifier: Apache-2.0
// Portable C++: one weight row after the other, its set bits in order.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {

bool wants_x32(DType, int64_t) { return true; }

template <typename T>
void linear(const LinearTask& task, int64_t begin, int64_t end) {
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t n = 0; n < a.rows; ++n) {
      const T* value = static_cast<const T*>(a.values) + a.offsets[r];
      const float* x = task.x32 + n * a.in_features;
      float sum = 0;
      for (int64_t w = 0; w < words; ++w, x += kWordBits) {
        for (uint32_t bits = a.words[r * words + w]; bits; bits &= bits - 1) {
          sum += to_float(*value++) * x[__builtin_ctz(bits)];
        }
      }
      store(bias ? sum + to_float(bias[r]) : sum, out + n * a.out_features + r);
    }
  }
}

template void linear<float>(const LinearTask&, int64_t, int64_t);
template void linear<BFloat16>(const LinearTask&, int64_t, int64_t);
template void linear<Half>(const LinearTask&, int64_t, int64_t);

}  // namespace mosaic::MOSAIC_ISA
