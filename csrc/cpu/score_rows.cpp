// SPDX-License-Identifier: Apache-2.0
// Statistics of one row or column block, bound by reading it.
#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {

template <typename T>
void score_row(const void* from, const float* norms, int64_t columns, float* scores) {
  const T* row = static_cast<const T*>(from);
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    store_lanes(scores + j, absolute(load_lanes(row + j)) * load_lanes(norms + j));
  }
  for (; j < columns; ++j) scores[j] = __builtin_fabsf(to_float(row[j])) * norms[j];
}

template <typename T>
double score_sum(const void* from, const float* norms, int64_t columns) {
  const T* row = static_cast<const T*>(from);
  Doubles lanes[2] = {};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    add_to(lanes, absolute(load_lanes(row + j)) * load_lanes(norms + j));
  }
  double sum = 0;
  for (; j < columns; ++j) sum += static_cast<double>(__builtin_fabsf(to_float(row[j])) * norms[j]);
  for (int i = 0; i < kLanes / 2; ++i) sum += lanes[0][i] + lanes[1][i];
  return sum;
}

template <typename T>
void count_outliers(const void* from, const float* norms, int64_t columns, const float* thresholds,
                    int64_t alpha_count, int64_t* counts) {
  const T* row = static_cast<const T*>(from);
  // The scores of 512 weights stay in L1 while every threshold passes over them.
  constexpr int64_t kBlock = 512;
  alignas(64) float scores[kBlock];
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t count = columns - first < kBlock ? columns - first : kBlock;
    const int64_t whole = count / kLanes * kLanes;
    score_row<T>(row + first, norms + first, count, scores);
    for (int64_t k = 0; k < alpha_count; ++k) {
      Flags above = {};
      for (int64_t i = 0; i < whole; i += kLanes) above -= load_lanes(scores + i) > thresholds[k];
      for (int i = 0; i < kLanes; ++i) counts[k] += above[i];
      for (int64_t i = whole; i < count; ++i) counts[k] += scores[i] > thresholds[k];
    }
  }
}

template <typename T>
void column_sums(const void* from, int64_t rows, int64_t stride, int64_t columns, double* sums) {
  using Unaligned = double __attribute__((vector_size(kLanes * 4), aligned(8)));
  const T* x = static_cast<const T*>(from);
  for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      Doubles squares[2] = {};
      add_to(squares, load_lanes(x + j));
      auto* to = reinterpret_cast<Unaligned*>(sums + j);
      to[0] += squares[0] * squares[0];
      to[1] += squares[1] * squares[1];
    }
    for (; j < columns; ++j) {
      const double v = static_cast<double>(to_float(x[j]));
      sums[j] += v * v;
    }
  }
}

#define MOSAIC_INSTANTIATE(T)                                                                           \
  template void score_row<T>(const void*, const float*, int64_t, float*);                               \
  template double score_sum<T>(const void*, const float*, int64_t);                                     \
  template void count_outliers<T>(const void*, const float*, int64_t, const float*, int64_t, int64_t*); \
  template void column_sums<T>(const void*, int64_t, int64_t, int64_t, double*);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
