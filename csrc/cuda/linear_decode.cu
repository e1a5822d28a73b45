// SPDX-License-Identifier: Apache-2.0
// Sparse linear for few rows, on the row bitmap.
//
// Bound by bytes: every value and every bit is read once, x comes from cache. One warp owns one output
// feature and walks its words from left to right:
//
//   load_words     lane i reads word w + i                     (one 128-byte transaction)
//   for each word  lane c owns column 32 w + c: its value is at base + rank(word, c), so the warp reads
//                  the word's values as one run, and x as another
//   reduce         fp32 partial sums of the lanes, always in the same order: two runs are byte-equal
//
// Invariant between words: `base` is the index of the first value of the next word, the same in all lanes.
// tests emulate this path on the CPU (csrc/cpu/emulate.cpp) with the same functions of format.h.
#include "cuda/launch.cuh"
#include "mosaic/cuda.h"

namespace mosaic::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

template <typename T, int kRows>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    linear_decode(const T* __restrict__ x, const T* __restrict__ values, const uint32_t* __restrict__ words,
                  const int64_t* __restrict__ offsets, const T* __restrict__ bias, T* __restrict__ out, int64_t in_features,
                  int64_t out_features) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= out_features) return;  // whole warps leave together

  const int64_t count = bitmask_words(in_features);
  const uint32_t* row_words = words + row * count;
  int64_t base = offsets[row];
  float sums[kRows] = {};

  for (int64_t first = 0; first < count; first += kWarp) {
    const uint32_t mine = first + lane < count ? row_words[first + lane] : 0;
    const int here = count - first < kWarp ? int(count - first) : kWarp;
    for (int i = 0; i < here; ++i) {
      const uint32_t word = __shfl_sync(kAllLanes, mine, i);
      if (is_kept(word, lane)) {
        const float value = to_float(values[base + rank(word, lane)]);
        const int64_t column = (first + i) * kWordBits + lane;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += value * to_float(x[r * in_features + column]);
      }
      base += popcount(word);
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    for (int step = kWarp / 2; step; step /= 2) sums[r] += __shfl_xor_sync(kAllLanes, sums[r], step);
    if (lane == 0) out[r * out_features + row] = from_float<T>(sums[r] + (bias ? to_float(bias[row]) : 0.0f));
  }
}

template <typename T, int kRows>
void launch(const LinearArgs& a, int64_t first_row, cudaStream_t stream) {
  const unsigned blocks = unsigned((a.out_features + kWarpsPerBlock - 1) / kWarpsPerBlock);
  linear_decode<T, kRows><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(
      static_cast<const T*>(a.x) + first_row * a.in_features, static_cast<const T*>(a.values), a.words, a.offsets,
      static_cast<const T*>(a.bias), static_cast<T*>(a.out) + first_row * a.out_features, a.in_features,
      a.out_features);
}

}  // namespace

Status sparse_linear(const LinearArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.out_features == 0) return {};
  return with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t row = 0;
    for (; row + 8 <= a.rows; row += 8) launch<T, 8>(a, row, stream);
    if (row + 4 <= a.rows) launch<T, 4>(a, row, stream), row += 4;
    if (row + 2 <= a.rows) launch<T, 2>(a, row, stream), row += 2;
    if (row < a.rows) launch<T, 1>(a, row, stream);
    return launched();
  });
}

}  // namespace mosaic::cuda
