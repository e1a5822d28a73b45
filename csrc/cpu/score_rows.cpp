// SPDX-License-Identifier: Apache-2.0
// Statistics of one row or column block. Written for the vectoriser: plain loops over small arrays of
// lanes, compiled once for each instruction set. Bound by reading the weight.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int kLanes = 16;

template <typename T>
float score(T weight, float norm) {
  return __builtin_fabsf(to_float(weight)) * norm;
}

}  // namespace

template <typename T>
double score_sum(const void* from, const float* norms, int64_t columns) {
  const T* row = static_cast<const T*>(from);
  double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += static_cast<double>(score(row[j + i], norms[j + i]));
  }
  double sum = 0;
  for (; j < columns; ++j) sum += static_cast<double>(score(row[j], norms[j]));
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
void count_outliers(const void* from, const float* norms, int64_t columns, const float* thresholds,
                    int64_t alpha_count, int64_t* counts) {
  const T* row = static_cast<const T*>(from);
  // Blocks keep the scores of 512 weights in L1 while every threshold passes over them.
  constexpr int64_t kBlock = 512;
  float scores[kBlock];
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t count = columns - first < kBlock ? columns - first : kBlock;
    for (int64_t i = 0; i < count; ++i) scores[i] = score(row[first + i], norms[first + i]);
    for (int64_t k = 0; k < alpha_count; ++k) {
      const float threshold = thresholds[k];
      int32_t above = 0;
      for (int64_t i = 0; i < count; ++i) above += scores[i] > threshold;
      counts[k] += above;
    }
  }
}

template <typename T>
void column_sums(const void* from, int64_t rows, int64_t stride, int64_t columns, double* sums) {
  const T* x = static_cast<const T*>(from);
  for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    for (int64_t j = 0; j < columns; ++j) {
      const double v = static_cast<double>(to_float(x[j]));
      sums[j] += v * v;
    }
  }
}

#define MOSAIC_INSTANTIATE(T)                                                                           \
  template double score_sum<T>(const void*, const float*, int64_t);                                     \
  template void count_outliers<T>(const void*, const float*, int64_t, const float*, int64_t, int64_t*); \
  template void column_sums<T>(const void*, int64_t, int64_t, int64_t, double*);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
