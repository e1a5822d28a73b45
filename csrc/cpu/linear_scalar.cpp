// SPDX-License-Identifier: Apache-2.0
// Portable C++: one weight row after the other, the set bits of each word in order, each times up to 8 rows
// of x: as many sums that do not wait for each other.
#include "cpu/linear_blocks.h"

namespace mosaic::MOSAIC_ISA {
namespace {

MOSAIC_HD float to_float(int8_t v) { return v; }

// One weight row times N rows of x, from row `first` on; V is what a value is stored as.
template <typename T, typename V, int N>
void multiply(const LinearTask& task, int64_t r, int64_t first) {
  using cpu::to_float;
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const T* bias = static_cast<const T*>(a.bias);
  const float* x = static_cast<const float*>(task.x) + first * words * kWordBits;
  const V* value = static_cast<const V*>(a.values) + a.offsets[r];
  float sum[N] = {};
  for (int64_t w = 0; w < words; ++w, x += N * kWordBits) {
    float part[N] = {};
    for (uint32_t bits = a.words[r * words + w]; bits; bits &= bits - 1) {
      const float weight = to_float(*value++);
      const float* column = x + __builtin_ctz(bits);
      for (int n = 0; n < N; ++n) part[n] += weight * column[n * kWordBits];
    }
    const float scale = a.scale_groups > 1 ? a.scales[r * a.scale_groups + w * kWordBits / kScaleColumns] : 1;
    for (int n = 0; n < N; ++n) sum[n] += part[n] * scale;
  }
  for (int n = 0; n < N; ++n) {
    float whole = a.scale_groups == 1 ? sum[n] * a.scales[r] : sum[n];
    if (task.x_scales) whole *= task.x_scales[first + n];
    store(bias ? whole + to_float(bias[r]) : whole,
          static_cast<T*>(a.out) + (first + n) * a.out_features + r);
  }
}

template <typename T, typename V>
void multiply_all(const LinearTask& task, int64_t begin, int64_t end) {
  for_each_block(task.args.rows, [&](int64_t first, auto count) {
    for (int64_t r = begin; r < end; ++r) multiply<T, V, decltype(count)::value>(task, r, first);
  });
}

}  // namespace

template <typename T>
bool linear(const LinearTask& task, int64_t begin, int64_t end) {
  multiply_all<T, T>(task, begin, end);
  return true;
}

template <typename T>
bool linear_int8(const LinearTask& task, int64_t begin, int64_t end) {
  multiply_all<T, int8_t>(task, begin, end);
  return true;
}

#define MOSAIC_INSTANTIATE(T)                                   \
  template bool linear<T>(const LinearTask&, int64_t, int64_t); \
  template bool linear_int8<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
